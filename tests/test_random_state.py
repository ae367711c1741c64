from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.random_state import random_state, restore_random_state


def test_restored_generators_repeat_what_they_drew() -> None:
    torch.rand(3)
    state = random_state()
    expected = torch.rand(5), torch.randn(5), torch.randperm(20)
    torch.manual_seed(99)
    restore_random_state(state)
    found = torch.rand(5), torch.randn(5), torch.randperm(20)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_drawing_does_not_change_a_state_taken_before() -> None:
    state = random_state()
    expected = state["cpu"].clone()
    torch.rand(1000)
    assert torch.equal(state["cpu"], expected)
    assert not torch.equal(torch.get_rng_state(), expected)


def test_a_state_is_data_that_a_file_keeps(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "state.pt")
    expected = torch.rand(5)
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize(
    ("devices", "kept", "restored"),
    [(0, 0, False), (0, 2, False), (1, 0, False), (1, 2, False), (2, 2, True)],
)
def test_devices_are_restored_only_if_all_are_there(
    monkeypatch: pytest.MonkeyPatch, devices: int, kept: int, restored: bool
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    states: list[Tensor] = [torch.full((4,), i, dtype=torch.uint8) for i in range(kept)]
    restore_random_state({**random_state(), "cuda": states})
    assert len(given) == restored
    for found in given:
        assert all(torch.equal(a, b) for a, b in zip(found, states, strict=True))


def test_devices_that_were_never_used_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("touched a device"))
    assert random_state()["cuda"] == []


@pytest.mark.gpu
def test_generators_of_the_device_repeat_too() -> None:
    torch.rand(3, device="cuda")
    state = random_state()
    assert len(state["cuda"]) == torch.cuda.device_count()
    expected = torch.rand(5, device="cuda")
    restore_random_state(state)
    assert torch.equal(torch.rand(5, device="cuda"), expected)

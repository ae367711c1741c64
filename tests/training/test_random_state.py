import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_dsmoe.training.random_state import (
    ResumableRandomState,
    check_random_state,
    random_state,
    restore_random_state,
)


def draw() -> list[Any]:
    drawn = [torch.rand(5), torch.randn(5), torch.randperm(20), np.random.rand(5)]
    return [*(each.tolist() for each in drawn), random.random(), random.gauss(), np.random.randn()]


def test_restored_generators_repeat_what_they_drew() -> None:
    draw()
    state = random_state()
    expected = draw()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(99)
    restore_random_state(state)
    assert draw() == expected


def test_states_of_torch_alone_are_restored() -> None:
    state = random_state()
    torch_only = {"cpu": state["cpu"], "cuda": []}
    check_random_state(torch_only)
    expected = torch.rand(5)
    restore_random_state(torch_only)
    assert torch.equal(torch.rand(5), expected)


def test_another_generator_of_numpy_is_left_alone() -> None:
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        state = random_state()
        check_random_state(state)
        expected = np.random.rand()
        restore_random_state(state)
        assert np.random.rand() != expected
    finally:
        np.random.set_bit_generator(before)


PYTHON = random.Random(1).getstate()
KEY = torch.zeros(624, dtype=torch.int64)


@pytest.mark.parametrize(
    "changes",
    [
        {"cpu": None},
        {"cpu": torch.zeros(3, dtype=torch.uint8)},
        {"cpu": torch.zeros(5056, dtype=torch.uint8)},
        {"cuda": None},
        {"cuda": [torch.zeros(16)]},
        {"python": ()},
        {"python": (3, (1, 2), None)},
        {"python": (*PYTHON[:2], "1")},
        {"numpy": 1},
        {"numpy": (torch.zeros(1, dtype=torch.int64).expand(10**9), 0, 0, 0.0)},
        {"numpy": (KEY[:5], 0, 0, 0.0)},
        {"numpy": (KEY, 625, 0, 0.0)},
        {"numpy": (KEY, -1, 0, 0.0)},
        {"numpy": (KEY, 0, 0, "1")},
    ],
)
def test_what_is_no_state_is_refused_in_one_line(changes: dict[str, Any]) -> None:
    expected = random.getstate()
    with pytest.raises(ValueError, match=r"^the checkpoint's random_state is not one: [^\n]+$"):
        check_random_state({**random_state(), **changes})
    assert random.getstate() == expected


def test_another_type_is_no_state_either() -> None:
    with pytest.raises(ValueError, match="random_state is not one"):
        check_random_state([1, 2])


def test_drawing_does_not_change_a_state_taken_before() -> None:
    state = random_state()
    expected = state["cpu"].clone()
    torch.rand(1000)
    assert torch.equal(state["cpu"], expected)
    assert not torch.equal(torch.get_rng_state(), expected)


def test_a_state_is_data_that_a_file_keeps(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw()
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    check_random_state(loaded)
    restore_random_state(loaded)
    assert draw() == expected


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


@pytest.mark.parametrize(
    ("saved", "n_ranks", "told"),
    [
        (None, 1, "of 0 processes and this run has 1: .* start anew from the seed"),
        ([None, None], 2, "of 0 processes and this run has 2: .* start anew from the seed"),
        ("one", 1, ""),
        ("list", 1, ""),
        ("list", 2, "of 1 processes and this run has 2: .* are seeded anew on each"),
    ],
)
def test_whatever_is_not_restored_is_said(saved: Any, n_ranks: int, told: str) -> None:
    state = random_state()
    given = {"one": state, "list": [state]}.get(saved, saved) if isinstance(saved, str) else saved
    device = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(world_size=n_ranks, global_rank=0, strategy=device)
    kept = ResumableRandomState()
    with pytest.warns(UserWarning, match=told) if told else nullcontext():
        kept.load({} if given is None else {"random_state": given}, trainer)


def test_states_of_another_number_of_gpus_are_said_to_be_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = SimpleNamespace(root_device=torch.device("cuda"))
    trainer: Any = SimpleNamespace(world_size=1, global_rank=0, strategy=device)
    states = [torch.zeros(16, dtype=torch.uint8)] * 8
    with pytest.warns(UserWarning, match="of 8 GPUs and 1 are visible here"):
        ResumableRandomState().load({"random_state": {**random_state(), "cuda": states}}, trainer)

import pytest
import torch

from lightning_dsmoe.precision import at_least_float32, has_autocast, without_autocast


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_raises_half_precision_alone(before: torch.dtype, after: torch.dtype) -> None:
    assert at_least_float32(torch.ones(2, dtype=before)).dtype == after


def test_switches_autocast_off_inside_alone() -> None:
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast("cpu"):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_no_graph_is_broken_by_asking_for_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = torch.compiler.disable(torch.amp.is_autocast_available)  # as it is in PyTorch 2.10
    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)

    @torch.compile(backend="eager", fullgraph=True)
    def product(x: torch.Tensor) -> torch.Tensor:
        with without_autocast(x.device.type):
            return x @ x

    assert product(torch.ones(2, 2)).tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert [has_autocast(device) for device in ("cpu", "cuda", "meta")] == [True, True, False]


def test_devices_without_autocast_are_fine() -> None:
    with without_autocast("meta"):
        assert torch.ones(2, device="meta").shape == (2,)

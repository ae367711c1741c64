import pytest
import torch

from lightning_dsmoe.stacked import StackedWeight


def test_starts_uniform_within_the_bound_of_its_fan_in() -> None:
    weight = StackedWeight(4, 50, 60, fan_in=25)()
    assert weight.shape == (4, 50, 60)
    assert 0.19 < weight.abs().max() <= 0.2
    assert weight.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.05)


def test_gives_some_experts_and_their_gradients() -> None:
    stacked = StackedWeight(4, 2, 3, fan_in=3)
    last, first = stacked.of([3, 0])
    assert torch.equal(last, stacked.weight[3])
    assert torch.equal(first, stacked.weight[0])
    (last.sum() + 2 * first.sum()).backward()
    assert stacked.weight.grad is not None
    assert stacked.weight.grad[:, 0, 0].tolist() == [2, 0, 0, 1]


def test_prints_its_sizes() -> None:
    assert str(StackedWeight(4, 2, 3, fan_in=3)) == "StackedWeight(n_experts=4, rows=2, d_model=3)"

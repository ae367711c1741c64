"""Output weights of all experts as one matrix."""

import gc
import weakref

import pytest
import torch

from lightning_dsmoe.inference.engine.batched import wide_weights
from lightning_dsmoe.inference.engine.batched.wide_weights import wide
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights, quantize_int8


def expected(weights: RowMajorWeights) -> torch.Tensor:
    return torch.cat(list(weights.rows(slice(None))), 1)


def weights_of(n_experts: int) -> RowMajorWeights:
    return RowMajorWeights(torch.randn(n_experts, 6, 4), transposed=True)


@pytest.mark.parametrize("n_experts", [1, 3])
def test_experts_stand_side_by_side(n_experts: int) -> None:
    weights = weights_of(n_experts)
    for each in (weights, quantize_int8(weights)):
        found = wide(each)
        assert found is not None
        assert torch.equal(found, expected(each))
        assert found.is_contiguous()


def test_a_copy_is_kept_until_its_weights_change() -> None:
    weights = weights_of(3)
    first = wide(weights)
    assert wide(weights) is first
    weights.weight.mul_(2)
    second = wide(weights)
    assert second is not None
    assert torch.equal(second, expected(weights))
    weights.double()
    third = wide(weights)
    assert third is not None
    assert torch.equal(third, expected(weights))
    gone = weakref.ref(third)
    del weights, third
    gc.collect()
    assert gone() is None


def test_a_copy_goes_when_its_weights_move() -> None:
    weights = weights_of(3)
    first = wide(weights)
    assert first is not None
    gone = weakref.ref(first)
    del first
    weights.double()
    gc.collect()
    assert gone() is None


def test_without_room_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(weights: RowMajorWeights) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(wide_weights, "_widened", too_large)
    weights = weights_of(3)
    with pytest.warns(UserWarning, match="no room for a second copy of output weights, 0 MB"):
        assert wide(weights) is None
    assert wide(weights) is None  # without a second warning

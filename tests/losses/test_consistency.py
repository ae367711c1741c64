from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dsmoe.losses import consistency_loss
from lightning_dsmoe.losses.consistency import CHUNK


def naive(logits: Tensor, others: Tensor) -> Tensor:
    p, q = logits.softmax(-1), others.softmax(-1)
    return 0.5 * (p * (p / q).log() + q * (q / p).log()).sum(-1)


def test_is_the_mean_divergence_of_tokens_that_count() -> None:
    logits, others = torch.randn(2, 2, 3, 7)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    each = naive(logits, others)
    torch.testing.assert_close(consistency_loss(logits, others), each.mean())
    torch.testing.assert_close(consistency_loss(logits, others, mask), each[mask].mean())
    one_way = F.kl_div(others.log_softmax(-1), logits.softmax(-1), reduction="sum")
    other_way = F.kl_div(logits.log_softmax(-1), others.softmax(-1), reduction="sum")
    found = consistency_loss(logits, others)
    torch.testing.assert_close(found, (one_way + other_way) / 2 / 6)


def test_predictions_that_are_alike_cost_nothing() -> None:
    logits = torch.randn(5, 7, requires_grad=True)
    shifted = (logits.detach() + 3).requires_grad_()
    loss = consistency_loss(logits, shifted)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_is_the_same_both_ways_and_teaches_both() -> None:
    logits, others = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    loss = consistency_loss(logits, others)
    torch.testing.assert_close(consistency_loss(others, logits), loss)
    loss.backward()
    for each in (logits, others):
        assert each.grad is not None
        assert each.grad.abs().sum() > 0


def test_nothing_but_padding_gives_zero() -> None:
    logits, others = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    loss = consistency_loss(logits, others, torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_gradient_agrees_with_finite_differences() -> None:
    logits, others = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(consistency_loss, (logits, others))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_stay_finite(dtype: torch.dtype) -> None:
    both = (1e4 * torch.randn(2, 16, 8).sign()).to(dtype).requires_grad_()
    loss = consistency_loss(*both)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert both.grad is not None
    assert both.grad.isfinite().all()


def test_autocast_leaves_it_in_float32() -> None:
    logits, others = torch.randn(2, 50, 7)
    with torch.autocast("cpu", torch.bfloat16):
        inside = consistency_loss(logits, others)
    assert torch.equal(inside, consistency_loss(logits, others))


class LargestFloat32(TorchDispatchMode):
    """Keeps the largest number of elements of a float32 result."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float32:
            self.elements = max(self.elements, made.numel())
        return made


def test_few_tokens_are_compared_at_a_time() -> None:
    both = torch.randn(2, 2 * CHUNK + 3, 50).bfloat16().requires_grad_()
    with LargestFloat32() as largest:
        torch.autograd.grad(consistency_loss(*both), both)
    assert 0 < largest.elements <= 50 * CHUNK


def test_only_the_logits_wait_for_the_backward_pass() -> None:
    tokens = 2 * CHUNK + 3
    logits, others = torch.randn(2, tokens, 50, requires_grad=True).bfloat16()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = consistency_loss(logits, others)
    assert sum(kept.values()) <= logits.untyped_storage().nbytes() + 8 * tokens
    expected = naive(logits.float(), others.float()).mean()
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, (logits, others))
    torch.testing.assert_close(found, torch.autograd.grad(expected, (logits, others)))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of shapes \(2, 5\) and \(3, 5\)"):
        consistency_loss(torch.zeros(2, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="mask of shape"):
        consistency_loss(torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(3))


def test_the_old_name_of_an_argument_warns() -> None:
    logits, other_logits = torch.randn(2, 3, 5)
    with pytest.warns(DeprecationWarning, match="is now other_logits="):
        old = consistency_loss(logits, others=other_logits)  # type: ignore[call-arg]
    assert torch.equal(old, consistency_loss(logits, other_logits))

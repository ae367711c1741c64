import math

import pytest
import torch

from lightning_dsmoe.losses import router_z_loss


def test_equal_logits_give_the_squared_shift() -> None:
    logits = torch.full((5, 4), 3.0)
    assert router_z_loss(logits).item() == pytest.approx((3 + math.log(4)) ** 2)


def test_is_the_mean_over_tokens_that_count() -> None:
    logits = torch.randn(2, 3, 4)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    each = logits.exp().sum(-1).log().square()
    torch.testing.assert_close(router_z_loss(logits), each.mean())
    torch.testing.assert_close(router_z_loss(logits, mask), each[mask].mean())


def test_nothing_but_padding_gives_zero() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = router_z_loss(logits, torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_stay_finite(dtype: torch.dtype) -> None:
    logits = (1e4 * torch.randn(16, 8).sign()).to(dtype).requires_grad_()
    loss = router_z_loss(logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e8, rel=1e-2)


def test_gradient_agrees_with_finite_differences() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(router_z_loss, logits)


def test_autocast_leaves_it_in_float32() -> None:
    logits = torch.randn(50, 7)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router_z_loss(logits)
    assert torch.equal(inside, router_z_loss(logits))

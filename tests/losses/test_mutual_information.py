import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dsmoe.losses import entropy, mutual_information_loss, routing_entropies

LN2 = math.log(2)
H91 = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
SMALL = settings(max_examples=25, deadline=None, derandomize=True)


def random_probs(*shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, dtype=dtype)).softmax(-1).requires_grad_()


@pytest.mark.parametrize(
    ("rows", "loss"),
    [
        pytest.param(torch.eye(4).tolist(), -math.log(4), id="one expert each"),
        pytest.param([[1.0, 0.0, 0.0]] * 5, 0.0, id="all on one expert"),
        pytest.param([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]] * 3, -LN2, id="two of four"),
        pytest.param([[0.9, 0.1], [0.1, 0.9]], H91 - LN2, id="mirrored"),
        pytest.param([[0.9, 0.1], [0.2, 0.8]], -0.2753961, id="skewed"),
        pytest.param([[0.25] * 4] * 3, 0.0, id="uniform"),
    ],
)
def test_known_values(rows: list[list[float]], loss: float) -> None:
    probs = torch.tensor(rows, requires_grad=True)
    value = mutual_information_loss(probs)
    assert value.item() == pytest.approx(loss, abs=1e-6)
    value.backward()
    assert probs.grad is not None
    assert probs.grad.isfinite().all()


@SMALL
@given(tokens=st.integers(1, 40), experts=st.integers(1, 64), scale=st.floats(0, 50))
def test_lies_between_minus_log_n_and_zero(tokens: int, experts: int, scale: float) -> None:
    loss = mutual_information_loss(random_probs(tokens, experts, scale=scale)).item()
    assert -math.log(experts) - 1e-5 <= loss <= 1e-5


@SMALL
@given(tokens=st.integers(1, 40), experts=st.integers(1, 64))
def test_uniform_routing_has_none(tokens: int, experts: int) -> None:
    probs = torch.full((tokens, experts), 1 / experts, requires_grad=True)
    loss = mutual_information_loss(probs)
    loss.backward()
    assert abs(loss.item()) <= 1e-5
    assert abs(mutual_information_loss(torch.full_like(probs.double(), 1 / experts))) <= 1e-7
    assert probs.grad is not None
    assert probs.grad.isfinite().all()


def test_one_token_gives_zero_and_no_gradient() -> None:
    probs = random_probs(1, 5)
    loss = mutual_information_loss(probs)
    loss.backward()
    assert loss.item() == 0
    assert probs.grad is not None
    assert probs.grad.abs().max() < 1e-6


def test_nothing_but_padding_gives_zero_and_keeps_the_graph() -> None:
    probs = random_probs(2, 3, 5)
    loss = mutual_information_loss(probs, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert probs.grad is not None
    assert torch.equal(probs.grad, torch.zeros_like(probs))


def test_padding_changes_neither_value_nor_gradient() -> None:
    probs = random_probs(3, 4, 5)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    padded = mutual_information_loss(probs, mask)
    plain = mutual_information_loss(probs[mask])
    (gradient,) = torch.autograd.grad(padded, probs)
    (expected,) = torch.autograd.grad(plain, probs)
    torch.testing.assert_close(padded, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    assert torch.equal(padded, mutual_information_loss(probs, mask.float()))


def test_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) for tokens of shape \(2, 3\)"):
        mutual_information_loss(random_probs(2, 3, 4), torch.ones(3))


def test_descent_sharpens_tokens_and_evens_the_experts() -> None:
    logits = (torch.randn(64, 4) + torch.tensor([1.5, 0, 0, 0])).requires_grad_()
    before = routing_entropies(logits.softmax(-1)[None])
    for _ in range(20):
        (gradient,) = torch.autograd.grad(mutual_information_loss(logits.softmax(-1)), logits)
        logits = (logits - 2.0 * gradient).detach().requires_grad_()
    after = routing_entropies(logits.softmax(-1)[None])
    assert after.marginal > before.marginal
    assert after.conditional < before.conditional


def test_gradient_agrees_with_finite_differences() -> None:
    x, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: mutual_information_loss((x @ w.T).softmax(-1), mask), weight, atol=1e-6
    )


def test_order_of_experts_and_tokens_does_not_matter() -> None:
    probs = random_probs(12, 6)
    shuffled = probs[torch.randperm(12)][:, torch.randperm(6)]
    torch.testing.assert_close(mutual_information_loss(shuffled), mutual_information_loss(probs))


def test_micro_batches_ask_for_balance_in_each() -> None:
    probs = random_probs(8, 6, 5)
    parts = torch.stack([mutual_information_loss(part) for part in probs])
    assert parts.mean() > mutual_information_loss(probs) + 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_logits_stay_finite(dtype: torch.dtype) -> None:
    logits = 1e4 * torch.randn(16, 8).sign()
    logits = logits.to(dtype).requires_grad_()
    loss = mutual_information_loss(logits.softmax(-1))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_autocast_leaves_it_in_float32() -> None:
    probs = random_probs(50, 7)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mutual_information_loss(probs)
    assert torch.equal(inside, mutual_information_loss(probs))


def test_several_routers_at_once_are_each_by_itself() -> None:
    probs = random_probs(3, 2, 5, 4)
    mask = torch.rand(2, 5) < 0.7
    entropies = routing_entropies(probs, mask)
    each = torch.stack([mutual_information_loss(router, mask) for router in probs])
    torch.testing.assert_close(entropies.conditional - entropies.marginal, each)
    torch.testing.assert_close(
        entropies.conditional, torch.stack([entropy(p[mask]).mean() for p in probs])
    )

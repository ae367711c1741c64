import math

import pytest
import torch

from lightning_dsmoe.losses import entropy


@pytest.mark.parametrize("n_experts", [1, 2, 7])
def test_uniform_probabilities_have_the_most(n_experts: int) -> None:
    probs = torch.full((3, n_experts), 1 / n_experts)
    torch.testing.assert_close(entropy(probs), torch.full((3,), math.log(n_experts)))


def test_certainty_has_none_and_a_finite_gradient() -> None:
    probs = torch.eye(4, requires_grad=True)
    value = entropy(probs)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(4))
    assert probs.grad is not None
    assert probs.grad.isfinite().all()


def test_gradient_agrees_with_finite_differences() -> None:
    probs = torch.rand(3, 4, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(entropy, probs.requires_grad_())

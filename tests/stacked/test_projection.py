import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_dsmoe.stacked import gated_projection


def operands(x: int, e: int, f: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((x, e, f), (x, e), (e, f, d))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def naive(hidden: Tensor, gates: Tensor, weight: Tensor) -> Tensor:
    return sum(
        (gates[:, e, None] * (hidden[:, e] @ weight[e]) for e in range(len(weight))),
        start=torch.zeros_like(hidden[:, 0, :1] @ weight[0, :1]),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(x=st.integers(0, 6), e=st.integers(1, 5), f=st.integers(1, 4), d=st.integers(1, 5))
def test_values_and_gradients_are_those_of_a_loop(x: int, e: int, f: int, d: int) -> None:
    inputs = operands(x, e, f, d)
    fast, slow = gated_projection(*inputs), naive(*inputs)
    torch.testing.assert_close(fast, slow)
    upstream = torch.randn_like(slow)
    torch.testing.assert_close(
        torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(slow, inputs, upstream)
    )


def test_gradient_agrees_with_finite_differences() -> None:
    assert torch.autograd.gradcheck(gated_projection, operands(3, 2, 2, 3))


def test_inputs_and_upstream_gradient_are_left_alone() -> None:
    inputs = operands(4, 3, 2, 5)
    upstream = torch.randn(4, 5, dtype=torch.float64)
    before = [tensor.detach().clone() for tensor in (*inputs, upstream)]
    gated_projection(*inputs).backward(upstream)
    for tensor, copy in zip((*inputs, upstream), before, strict=True):
        assert torch.equal(tensor, copy)


def test_second_derivatives_are_refused() -> None:
    inputs = operands(4, 3, 2, 5)
    loss = gated_projection(*inputs).square().sum()
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()


def test_keeps_its_inputs_and_nothing_else() -> None:
    inputs = operands(64, 4, 8, 5)
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gated_projection(*inputs)
    assert set(kept) == {tensor.data_ptr() for tensor in inputs}


def test_autocast_multiplies_in_half_precision() -> None:
    inputs = operands(8, 3, 4, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_projection(*inputs)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), naive(*inputs), atol=5e-2, rtol=2e-2)
    assert [t.grad.dtype for t in inputs if t.grad is not None] == [torch.float32] * 3


def test_gates_take_the_type_of_the_hidden_units() -> None:
    hidden, gates, weight = operands(4, 3, 2, 5, torch.bfloat16)
    assert gated_projection(hidden, gates.float(), weight).dtype == torch.bfloat16

"""Dense and sparse experts against a loop that applies one expert after another."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.experts import Experts, GLUExperts, MLPExperts
from lightning_dsmoe.experts.experts import ACTIVATIONS

KINDS = st.sampled_from([MLPExperts, GLUExperts])
SIZES = st.integers(1, 5)


def loop(experts: Experts, x: Tensor, gates: Tensor) -> Tensor:
    act = getattr(F, experts.activation)
    y = torch.zeros_like(x)
    for e in range(experts.n_experts):
        z = x @ experts.w_in.weight[e].T
        if experts.b_in is not None:
            z = z + experts.b_in[e]
        if isinstance(experts, GLUExperts):
            hidden = act(z[:, : experts.d_expert]) * z[:, experts.d_expert :]
        else:
            hidden = act(z)
        y = y + gates[:, e, None] * (hidden @ experts.w_out.weight[e])
    return y if experts.b_out is None else y + experts.b_out


def randomised(experts: Experts) -> Experts:
    """In double precision and with biases that are not zero."""
    experts.double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def assert_same(experts: Experts, fast: Tensor, slow: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(fast, slow)
    wanted = [*experts.parameters(), *inputs]
    upstream = torch.randn_like(slow)
    torch.testing.assert_close(
        torch.autograd.grad(fast, wanted, upstream, materialize_grads=True),
        torch.autograd.grad(slow, wanted, upstream, materialize_grads=True),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=KINDS,
    n_experts=SIZES,
    d_expert=SIZES,
    d_model=SIZES,
    tokens=st.integers(0, 6),
    activation=st.sampled_from(["gelu", "silu", "relu"]),
    bias=st.booleans(),
    share=st.floats(0, 1),
)
def test_values_and_gradients_are_those_of_the_loop(
    kind: type[Experts],
    n_experts: int,
    d_expert: int,
    d_model: int,
    tokens: int,
    activation: str,
    bias: bool,
    share: float,
) -> None:
    experts = randomised(kind(d_model, n_experts, d_expert, activation=activation, bias=bias))
    x = torch.randn(tokens, d_model, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(tokens, n_experts, dtype=torch.float64, requires_grad=True)
    assert_same(experts, experts(x, gates), loop(experts, x, gates), x, gates)
    assert_same(experts, experts(x), loop(experts, x, torch.ones_like(gates)), x)
    if not tokens:
        assert experts.sparse_forward(x, gates, gates > 0).shape == x.shape
        return
    active = torch.rand(tokens, n_experts) < share
    active[0, 0] = True
    sparse = experts.sparse_forward(x, gates * active, active)
    assert_same(experts, sparse, loop(experts, x, gates * active), x, gates)


@pytest.mark.parametrize("kind", [MLPExperts, GLUExperts])
def test_experts_that_nobody_picked_are_never_read(kind: type[Experts]) -> None:
    experts = kind(6, 4, 3, bias=True)
    with torch.no_grad():
        for parameter in (experts.w_in.weight, experts.w_out.weight, experts.b_in):
            assert parameter is not None
            parameter[3] = float("nan")
    x, gates = torch.randn(8, 6), torch.rand(8, 4)
    active = torch.rand(8, 4) < 0.6
    active[:, 3] = False
    assert experts.sparse_forward(x, gates * active, active).isfinite().all()
    assert experts(x, gates).isnan().all()


@pytest.mark.parametrize("kind", [MLPExperts, GLUExperts])
def test_training_with_an_expert_without_tokens_leaves_it_alone(kind: type[Experts]) -> None:
    experts = kind(6, 4, 3)
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    before = experts.w_in.weight.detach().clone()
    active = torch.zeros(8, 4, dtype=torch.bool)
    active[:, :2] = True
    experts.sparse_forward(torch.randn(8, 6), torch.rand(8, 4), active).square().sum().backward()
    assert experts.w_in.weight.grad is not None
    assert torch.equal(experts.w_in.weight.grad[2:], torch.zeros_like(before[2:]))
    optimizer.step()
    assert torch.equal(experts.w_in.weight[2:], before[2:])
    assert not torch.equal(experts.w_in.weight[:2], before[:2])


@pytest.mark.parametrize("kind", [MLPExperts, GLUExperts])
def test_one_expert_as_wide_as_all_starts_like_them(kind: type[Experts]) -> None:
    many, one = kind(32, 8, 40), kind(32, 1, 320)
    for of_many, of_one in zip(many.parameters(), one.parameters(), strict=True):
        assert of_many.numel() == of_one.numel()
        assert of_many.std().item() == pytest.approx(of_one.std().item(), rel=0.05)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, -2)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"got {sizes[0]}, {sizes[1]} and {sizes[2]}"):
        MLPExperts(*sizes)


@pytest.mark.parametrize(
    "activation",
    ["nothing", "", "math", "dropout", "one_hot", "softmax", "rrelu", 3, ["relu"], None],
)
def test_unknown_activations_are_refused(activation: object) -> None:
    message = rf"^activation must be one of celu, elu, gelu, .*, got {re.escape(repr(activation))}$"
    with pytest.raises(ValueError, match=message):
        GLUExperts(2, 2, 2, activation=activation)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_work_on_each_number_by_itself(activation: str) -> None:
    experts = MLPExperts(2, 2, 2, activation=activation)
    x = torch.linspace(-7, 7, 12).view(3, 4)
    found = experts.activate(x)
    alone = [experts.activate(each) for each in x.flatten()]
    torch.testing.assert_close(found, torch.stack(alone).view(3, 4))
    assert torch.equal(found, experts.activate(x))

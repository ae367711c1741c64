"""Layers that read all weights, against loops over experts."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts import Experts, GLUExperts, MLPExperts
from lightning_dsmoe.experts.feed_forward import ExpertsFactory
from lightning_dsmoe.inference.engine.rows import Rows
from lightning_dsmoe.inference.engine.wide import attend_groups, wide_experts, wide_heads, wide_sum

from .conftest import assert_near

EXPERTS = [
    partial(MLPExperts, bias=True),
    partial(GLUExperts, activation="silu"),
    partial(GLUExperts, activation="relu", bias=True),
]


def drawn(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


def each_expert(experts: Experts, x_XD: Tensor) -> Tensor:
    """Outputs `[X, E, D]` in double precision, without the bias that all share."""
    outputs = []
    for e in range(experts.n_experts):
        b_in = None if experts.b_in is None else experts.b_in[e].double()
        z = F.linear(x_XD.double(), experts.w_in.weight[e].double(), b_in)
        outputs.append(experts.hidden(z) @ experts.w_out.weight[e].double())
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
@pytest.mark.parametrize("n_experts", [1, 5])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("make", EXPERTS, ids=str)
@torch.no_grad()
def test_experts(make: ExpertsFactory, gated: bool, n_experts: int, n_tokens: int) -> None:
    experts = make(24, n_experts, 7)
    drawn(experts)
    x_XD = torch.randn(n_tokens, 24)
    gates = torch.rand(n_tokens, n_experts) if gated else None
    shares = torch.ones(n_tokens, n_experts) if gates is None else gates
    expected = torch.einsum("xe,xed->xd", shares.double(), each_expert(experts, x_XD))
    if experts.b_out is not None:
        expected += experts.b_out
    experts.w_in = Rows(experts.w_in.weight, transposed=False)
    experts.w_out = Rows(experts.w_out.weight.mT, transposed=True)
    assert_near(wide_experts(experts, x_XD, gates), expected.float(), 1e-6)


@pytest.mark.parametrize("n_experts", [1, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_sums(biased: bool, gated: bool, n_experts: int) -> None:
    matrices, hidden = torch.randn(n_experts, 6, 5), torch.randn(3, n_experts, 6)
    bias = torch.randn(5) if biased else None
    gates = torch.rand(3, n_experts) if gated else None
    expected = torch.zeros(3, 5)
    for x in range(3):
        for e in range(n_experts):
            gate = 1.0 if gates is None else gates[x, e]
            expected[x] += gate * (hidden[x, e] @ matrices[e])
        expected[x] += 0 if bias is None else bias
    found = wide_sum(Rows(matrices.mT, transposed=True), hidden.clone(), gates, bias)
    assert_near(found, expected, 1e-6)


def attention_by_hand(
    heads: HeadGroups, q_BTEHC: Tensor, scope: Scope, keys: Tensor, values: Tensor
) -> Tensor:
    batch, length, n_groups, n_heads, _ = q_BTEHC.shape
    results = []
    for b in range(batch):
        for t in range(length):
            position = scope.positions_BT.expand(batch, -1)[b, t]
            seen = torch.arange(keys.shape[2]) <= t
            seen = seen if scope.attend_BTS is None else scope.attend_BTS[b, t]
            for e in range(n_groups):
                for h in range(n_heads):
                    q = heads.place(heads.q_norm(q_BTEHC[b, t, e, h]), position).double()
                    scores = keys[b, h].double()[seen] @ q / heads.d_head**0.5
                    results.append(scores.softmax(0) @ values[b, h].double()[seen])
    return torch.stack(results).view(batch, length, n_groups, -1).float()


def scope_of(kind: str, length: int) -> tuple[Scope, int]:
    """Who attends to whom, for two sequences, and how many tokens there are so far."""
    if kind == "causal":
        return Scope(torch.arange(length)[None], None), length
    n_seen = length + 4
    positions = torch.arange(length) + torch.tensor([[4], [1]])
    attend = torch.arange(n_seen) <= (torch.arange(length) + 4)[:, None]
    attend = attend.repeat(2, 1, 1)
    if kind == "padded":
        attend[1, :, :3] = False
    return Scope(positions, attend), n_seen


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("kind", ["causal", "cached", "padded"])
@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "bias": True, "rope_theta": None}], ids=str
)
@torch.no_grad()
def test_heads(options: dict[str, object], n_groups: int, kind: str, length: int) -> None:
    heads = HeadGroups(24, n_groups, 2, 6, **options)
    drawn(heads)
    scope, n_seen = scope_of(kind, length)
    keys, values = torch.randn(2, 2, 2, n_seen, 6)
    q_BTEHC = torch.randn(2, length, n_groups, 2, 6)
    expected = attention_by_hand(heads, q_BTEHC, scope, keys, values)
    assert_near(attend_groups(heads, q_BTEHC, scope, keys, values), expected, 2e-6)

    x_BTD, gates = torch.randn(2, length, 24), torch.rand(2 * length, n_groups)
    q_BTER = torch.einsum("btd,erd->bter", x_BTD, heads.w_q.weight)
    q_BTER = q_BTER if heads.b_q is None else q_BTER + heads.b_q
    attended = attention_by_hand(heads, q_BTER.unflatten(-1, (2, 6)), scope, keys, values)
    w_q, w_o = heads.w_q.weight, heads.w_o.weight
    heads.w_q, heads.w_o = Rows(w_q, transposed=False), Rows(w_o.mT, transposed=True)
    for some in (gates, None):
        shares = torch.ones_like(gates) if some is None else gates
        summed = torch.einsum("xe,xer,erd->xd", shares, attended.flatten(0, 1), w_o)
        summed = summed if heads.b_o is None else summed + heads.b_o
        assert_near(wide_heads(heads, x_BTD, scope, keys, values, some), summed, 3e-6)

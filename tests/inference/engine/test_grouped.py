"""Layers that run each expert on its own tokens, against loops over tokens and experts."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts import GLUExperts, MLPExperts
from lightning_dsmoe.experts.feed_forward import ExpertsFactory
from lightning_dsmoe.inference.engine.grouped import grouped_experts, grouped_heads, pair_up
from lightning_dsmoe.inference.engine.rows import Rows
from lightning_dsmoe.inference.engine.wide import wide_heads

from .conftest import assert_near

_ACTIVE = {
    "mixed": [[1, 0, 0, 1, 0], [0, 0, 0, 1, 0], [1, 1, 0, 1, 1], [0, 1, 0, 0, 0]],
    "same": [[0, 1, 0, 0, 1]] * 4,
    "one each": [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]],
    "every": [[1] * 5] * 4,
    "one token": [[0, 0, 1, 1, 0]],
}


@pytest.fixture(params=_ACTIVE)
def active(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(_ACTIVE[request.param]).bool()


@pytest.fixture
def gates(active: Tensor) -> Tensor:
    return (torch.rand(active.shape) + 0.1) * active


def drawn(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


def poison(weights: list[Tensor], active: Tensor) -> None:
    """Make the experts that no token runs visible as NaN."""
    for weight in weights:
        weight[~active.any(0)] = torch.nan


def test_pairs(active: Tensor) -> None:
    pairs = pair_up(active)
    expected = [(e, x) for e in range(5) for x in range(len(active)) if active[x, e]]
    assert pairs.token_P.tolist() == [x for _, x in expected]
    running = []
    for group in pairs.groups:
        assert group.experts == sorted(group.experts)
        assert len(group.experts) <= 2
        assert group.tokens_GM.shape == (len(group.experts), max(group.counts))
        every = zip(group.experts, group.counts, group.pairs, group.tokens_GM, strict=True)
        for e, count, start, tokens_M in every:
            own = [x for x in range(len(active)) if active[x, e]]
            assert tokens_M[:count].tolist() == own
            assert expected[start : start + count] == [(e, x) for x in own]
            running.append(e)
    assert sorted(running) == active.any(0).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "make",
    [
        partial(MLPExperts, bias=True),
        partial(GLUExperts, activation="silu"),
        partial(GLUExperts, activation="silu", bias=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_experts(make: ExpertsFactory, active: Tensor, gates: Tensor) -> None:
    experts = make(24, 5, 7)
    drawn(experts)
    x_XD = torch.randn(len(active), 24)
    expected = torch.zeros(len(active), 24, dtype=torch.double)
    for x, e in active.nonzero().tolist():
        b_in = None if experts.b_in is None else experts.b_in[e].double()
        hidden = experts.hidden(F.linear(x_XD[x].double(), experts.w_in.weight[e].double(), b_in))
        expected[x] += gates[x, e].double() * (hidden @ experts.w_out.weight[e].double())
    if experts.b_out is not None:
        expected += experts.b_out
    experts.w_in = Rows(experts.w_in.weight, transposed=False)
    experts.w_out = Rows(experts.w_out.weight.mT, transposed=True)
    biases = [] if experts.b_in is None else [experts.b_in]
    poison([experts.w_in.weight, experts.w_out.weight, *biases], active)
    found = grouped_experts(experts, x_XD, gates, pair_up(active))
    assert_near(found, expected.float(), 1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "bias": True, "rope_theta": None}], ids=str
)
@pytest.mark.parametrize("batch", [1, 2, 4])
@torch.no_grad()
def test_heads(batch: int, options: dict[str, object], active: Tensor, gates: Tensor) -> None:
    if len(active) % batch:
        active, gates = active.repeat(batch, 1), gates.repeat(batch, 1)
    length = len(active) // batch
    heads = HeadGroups(24, 5, 2, 6, **options)
    drawn(heads)
    x_BTD = torch.randn(batch, length, 24)
    keys, values = torch.randn(2, batch, 2, length + 3, 6)
    attend = torch.arange(length + 3) <= torch.arange(length)[:, None] + 3
    attend = attend.repeat(batch, 1, 1)
    attend[-1, :, :2] = False
    scope = Scope((torch.arange(length) + 3).repeat(batch, 1), attend)
    w_q, w_o = heads.w_q.weight, heads.w_o.weight
    heads.w_q, heads.w_o = Rows(w_q, transposed=False), Rows(w_o.mT, transposed=True)
    expected = wide_heads(heads, x_BTD, scope, keys, values, gates)
    biases = [] if heads.b_q is None else [heads.b_q]
    poison([heads.w_q.weight, heads.w_o.weight, *biases], active)
    found = grouped_heads(heads, x_BTD, scope, keys, values, gates, pair_up(active))
    assert_near(found, expected, 2e-6)

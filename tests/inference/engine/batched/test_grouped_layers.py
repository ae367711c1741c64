"""Layers that run each expert on its own tokens, against loops over tokens, experts and heads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts.feed_forward import ExpertsFactory
from lightning_dsmoe.inference.engine.batched.grouped_layers import (
    add_grouped_experts,
    add_grouped_heads,
    grouping_pays,
    sort_by_expert,
)
from lightning_dsmoe.inference.engine.weights.row_major import Int8RowMajorWeights, RowMajorWeights

from ....pairwise import pairwise
from .loops import (
    CONTEXTS,
    EXPERTS,
    HEADS,
    WEIGHTS,
    assert_adds,
    drawn,
    loop_over_experts,
    loop_over_heads,
    read,
)

# How many tokens run each expert, at the most.
COUNTS = {
    "few before many": [1, 0, 23, 2, 0],
    "many before few": [0, 23, 1, 0, 2],
    "far apart": [23, 1, 0, 0, 12],
    "few beside one of an earlier group": [1, 23, 23, 5, 0],
    "an odd one": [3, 17, 1, 23, 2],
    "one alone": [0, 0, 4, 0, 0],
    "every": [23, 23, 23, 23, 23],
}


def active_of(counts: list[int], n_tokens: int) -> Tensor:
    active = torch.zeros(n_tokens, len(counts), dtype=torch.bool)
    for e, count in enumerate(counts):
        active[torch.randperm(n_tokens)[:count], e] = True
    return active


def gates_like(active: Tensor) -> Tensor:
    return torch.rand(active.shape) + 0.1


def poison(layer: nn.Module, active: Tensor) -> None:
    """Make the experts that no token runs visible as NaN."""
    idle = ~active.any(0)
    for rows in layer.children():
        if isinstance(rows, RowMajorWeights):
            (rows.scales if isinstance(rows, Int8RowMajorWeights) else rows.weight)[idle] = (
                torch.nan
            )
    for name in ("b_in", "b_q"):
        if getattr(layer, name, None) is not None:
            getattr(layer, name)[idle] = torch.nan


@pytest.mark.parametrize(
    ("counts", "n_tokens", "macs", "d_model", "pays"),
    [
        ([1, 0, 0, 0], 1, 10**8, 10**4, True),  # a quarter is read
        ([1, 1, 1, 1], 1, 10**8, 10**4, False),  # nothing is saved
        ([500, 0, 500, 0], 1000, 10**6, 1000, True),
        ([1000, 1000, 1000, 999], 1000, 10**6, 1000, False),  # one token alone stays away
        ([4, 4, 0, 0], 8, 10**4, 100, False),  # small experts
        ([4, 4, 0, 0], 8, 10**6, 1000, True),
        ([4000, 4000, 4000, 4000], 8000, 10**4, 100, True),
        ([4000, 4000, 4000, 4000], 8000, 10**4, 1000, False),  # wide tokens for little work
        ([0, 0, 0, 0], 8, 10**4, 100, True),  # nothing runs
    ],
)
def test_grouping_pays_where_it_saves_more_than_it_costs(
    counts: list[int], n_tokens: int, macs: int, d_model: int, pays: bool
) -> None:
    assert grouping_pays(counts, n_tokens, len(counts), macs, d_model) == pays


@pytest.mark.parametrize("n_tokens", [1, 4, 23])
@pytest.mark.parametrize("counts", COUNTS)
def test_pairs(n_tokens: int, counts: str) -> None:
    active = active_of(COUNTS[counts], n_tokens)
    gates = gates_like(active)
    pairs = sort_by_expert(gates, active, active.sum(0).tolist())
    end, sizes, running = 0, [], []
    slots: dict[int, list[int]] = {x: [] for x in range(n_tokens)}
    for group in pairs.groups:
        most = max(group.counts)
        assert group.pairs == slice(end, end + most * len(group.experts))
        for e, count in zip(group.experts, group.counts, strict=True):
            own = slice(end, end + count)
            tokens = active[:, e].nonzero().flatten()
            assert torch.equal(pairs.token_P[own], tokens)
            assert torch.equal(pairs.gate_P[own], gates[tokens, e])
            for x, slot in zip(tokens.tolist(), pairs.slot_P[own].tolist(), strict=True):
                slots[x].append(slot)
            end += most
        assert group.experts == sorted(group.experts)
        running += group.experts
        sizes += sorted(group.counts, reverse=True)
    assert len(pairs.token_P) == len(pairs.gate_P) == len(pairs.slot_P) == end
    assert sorted(running) == active.any(0).nonzero().flatten().tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert [len(group.experts) for group in pairs.groups[:-1]] == [2] * (len(pairs.groups) - 1)
    assert len(pairs.groups[-1].experts) in (1, 2)
    assert pairs.n_slots == active.sum(1).max()
    assert all(sorted(own) == sorted({*own} & {*range(pairs.n_slots)}) for own in slots.values())


@pytest.mark.parametrize(
    ("make", "weights", "n_tokens", "counts"),
    pairwise(make=EXPERTS, weights=WEIGHTS, n_tokens=[1, 4, 23], counts=COUNTS),
)
@torch.no_grad()
def test_experts(make: ExpertsFactory, weights: str, n_tokens: int, counts: str) -> None:
    experts = make(24, 5, 7)
    drawn(experts, weights)
    active = active_of(COUNTS[counts], n_tokens)
    x_ND, gates = torch.randn(n_tokens, 24), gates_like(active)
    expected = loop_over_experts(experts, x_ND, gates * active)
    poison(experts, active)
    pairs = sort_by_expert(gates, active, active.sum(0).tolist())
    assert_adds(lambda into: add_grouped_experts(into, experts, x_ND, pairs), expected)


@pytest.mark.parametrize(
    ("make", "weights", "n_groups", "context", "counts"),
    pairwise(make=HEADS, weights=WEIGHTS, n_groups=[3, 5], context=CONTEXTS, counts=COUNTS),
)
@torch.no_grad()
def test_heads(
    make: Callable[..., HeadGroups], weights: str, n_groups: int, context: str, counts: str
) -> None:
    heads = make(24, n_groups, 2, 6)
    drawn(heads, weights)
    seen = read(heads, context)
    active = active_of(COUNTS[counts][:n_groups], seen.x_BTD[..., 0].numel())
    gates = gates_like(active)
    expected = loop_over_heads(heads, seen, gates * active)
    poison(heads, active)
    pairs = sort_by_expert(gates, active, active.sum(0).tolist())
    assert_adds(lambda into: add_grouped_heads(into, heads, *seen.attended, pairs), expected, 3e-6)

"""Layers that read all weights, against loops over tokens, experts and heads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts.feed_forward import ExpertsFactory
from lightning_dsmoe.inference.engine.batched import masked_layers
from lightning_dsmoe.inference.engine.batched.masked_layers import (
    add_masked_experts,
    add_masked_heads,
    attend_groups,
)
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights

from ....pairwise import pairwise
from ..conftest import assert_near
from .loops import (
    CONTEXTS,
    EXPERTS,
    HEADS,
    WEIGHTS,
    assert_adds,
    attended,
    drawn,
    loop_over_experts,
    loop_over_heads,
    read,
)


def gates_of(kind: str, n_tokens: int, n_experts: int) -> Tensor:
    gates = torch.rand(n_tokens, n_experts) + 0.1
    if kind == "some zero":
        gates *= torch.arange(gates.numel()).view_as(gates) % 4 > 0
    return torch.ones_like(gates) if kind == "none" else gates


GATINGS = ["none", "all", "some zero"]
MAX_TOKENS = [0, 256]
"""Of which matrix products are taken several at once: none, or as many as are in these tests."""


@pytest.fixture(autouse=True)
def matrices_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take several products at once for small matrices, too."""
    monkeypatch.setattr(masked_layers, "_PRODUCTS_MIN_WEIGHTS", 0)


@pytest.mark.parametrize(
    ("make", "weights", "n_experts", "n_tokens", "gating", "max_tokens"),
    pairwise(
        make=EXPERTS,
        weights=WEIGHTS,
        n_experts=[1, 4, 5],
        n_tokens=[1, 2, 9, 40],
        gating=GATINGS,
        max_tokens=MAX_TOKENS,
    ),
)
@torch.no_grad()
def test_experts(
    make: ExpertsFactory,
    weights: str,
    n_experts: int,
    n_tokens: int,
    gating: str,
    max_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masked_layers, "_PRODUCTS_MAX_TOKENS", max_tokens)
    experts = make(24, n_experts, 7)
    drawn(experts, weights)
    x_ND, gates = torch.randn(n_tokens, 24), gates_of(gating, n_tokens, n_experts)
    given = None if gating == "none" else gates
    assert_adds(
        lambda into: add_masked_experts(into, experts, x_ND, given),
        loop_over_experts(experts, x_ND, gates),
    )


@pytest.mark.parametrize(
    ("make", "weights", "n_experts", "gating", "fits"),
    pairwise(make=EXPERTS, weights=WEIGHTS, n_experts=[1, 4], gating=GATINGS, fits=[True, False]),
)
@torch.no_grad()
def test_experts_as_on_a_gpu(
    make: ExpertsFactory,
    weights: str,
    n_experts: int,
    gating: str,
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masked_layers, "_in_one_product", lambda x: True)
    if not fits:
        monkeypatch.setattr(masked_layers, "wide", lambda weights: None)
    experts = make(24, n_experts, 7)
    drawn(experts, weights)
    x_ND, gates = torch.randn(9, 24), gates_of(gating, 9, n_experts)
    given = None if gating == "none" else gates
    assert_adds(
        lambda into: add_masked_experts(into, experts, x_ND, given),
        loop_over_experts(experts, x_ND, gates),
    )


@torch.no_grad()
def test_experts_under_zero_gates_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without them then gives the very same sums for many tokens."""
    monkeypatch.setattr(masked_layers, "_PRODUCTS_MAX_TOKENS", 0)
    weight, hidden, gates = torch.randn(5, 24, 7), torch.randn(9, 5, 7), torch.rand(9, 5)
    gates[:, [1, 4]] = 0
    sums = []
    for remaining in (range(5), [0, 2, 3]):
        sums.append(torch.zeros(9, 24))
        rows = RowMajorWeights(weight[list(remaining)], transposed=True)
        masked_layers._add_gated_products(
            sums[-1], rows, hidden[:, list(remaining)], gates[:, list(remaining)], None
        )
    assert torch.equal(*sums)


@pytest.mark.parametrize(
    ("make", "n_experts", "gating", "max_tokens"),
    pairwise(make=EXPERTS, n_experts=[1, 4, 5], gating=GATINGS, max_tokens=MAX_TOKENS),
)
@torch.no_grad()
def test_experts_in_bfloat16(
    make: ExpertsFactory,
    n_experts: int,
    gating: str,
    max_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masked_layers, "_PRODUCTS_MAX_TOKENS", max_tokens)
    experts = make(24, n_experts, 7)
    drawn(experts, "float32")
    experts.bfloat16()
    x_ND, gates = torch.randn(9, 24).bfloat16(), gates_of(gating, 9, n_experts)
    into = torch.zeros_like(x_ND)
    add_masked_experts(into, experts, x_ND, None if gating == "none" else gates)
    assert_near(into.double(), loop_over_experts(experts, x_ND, gates), 2e-2)


@pytest.mark.parametrize(
    ("make", "weights", "n_groups", "context", "gating", "max_tokens"),
    pairwise(
        make=HEADS,
        weights=WEIGHTS,
        n_groups=[1, 3],
        context=CONTEXTS,
        gating=GATINGS,
        max_tokens=MAX_TOKENS,
    ),
)
@torch.no_grad()
def test_heads(
    make: Callable[..., HeadGroups],
    weights: str,
    n_groups: int,
    context: str,
    gating: str,
    max_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masked_layers, "_PRODUCTS_MAX_TOKENS", max_tokens)
    heads = make(24, n_groups, 2, 6)
    drawn(heads, weights)
    seen = read(heads, context)
    gates = gates_of(gating, seen.x_BTD[..., 0].numel(), n_groups)
    given = None if gating == "none" else gates
    assert_adds(
        lambda into: add_masked_heads(into, heads, *seen.attended, given),
        loop_over_heads(heads, seen, gates),
        3e-6,
    )


@pytest.mark.parametrize(
    ("make", "n_groups", "context"), pairwise(make=HEADS, n_groups=[1, 2, 4], context=CONTEXTS)
)
@torch.no_grad()
def test_any_number_of_groups_attends(
    make: Callable[..., HeadGroups], n_groups: int, context: str
) -> None:
    heads = make(24, 3, 2, 6)
    drawn(heads, "float32")
    seen = read(heads, context)
    batch, length, _ = seen.x_BTD.shape
    q_BTEHC = torch.randn(batch, length, n_groups, 2, 6)
    expected = torch.zeros(batch, length, n_groups, 12)
    for b, t, e in torch.ones(batch, length, n_groups).nonzero().tolist():
        expected[b, t, e] = attended(heads, seen, b, t, q_BTEHC[b, t, e].double()).flatten()
    actual = attend_groups(heads, q_BTEHC, seen.scope, seen.keys, seen.values)
    assert_near(actual, expected, 2e-6)

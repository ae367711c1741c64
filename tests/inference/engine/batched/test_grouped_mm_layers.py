"""Layers with one product for all experts, against loops over tokens, experts and heads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts.feed_forward import ExpertsFactory
from lightning_dsmoe.inference.engine.batched import grouped_mm_layers
from lightning_dsmoe.inference.engine.batched.grouped_mm_layers import (
    add_grouped_experts,
    add_grouped_heads,
)
from lightning_dsmoe.inference.engine.batched.pairs_on_device import PairsOnDevice, sort_on_device

from ....pairwise import pairwise
from ..conftest import assert_near
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
from .test_grouped_layers import COUNTS, active_of, gates_like, poison

pytestmark = pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="torch.nn.functional.grouped_mm came with torch 2.10"
)


def sorted_pairs(active_NE: Tensor, gates_NE: Tensor, room: int) -> PairsOnDevice:
    most = min(active_NE.shape[1], int(active_NE.sum(1).max()) + room)
    n_pairs = int(active_NE.sum()) + room
    return sort_on_device(gates_NE, active_NE, n_pairs=n_pairs, most=most)


@pytest.mark.parametrize(
    ("make", "weights", "n_tokens", "counts", "room"),
    pairwise(make=EXPERTS, weights=WEIGHTS, n_tokens=[1, 4, 23], counts=COUNTS, room=[0, 9]),
)
@torch.no_grad()
def test_experts(make: ExpertsFactory, weights: str, n_tokens: int, counts: str, room: int) -> None:
    experts = make(24, 5, 8)
    drawn(experts, weights)
    active = active_of(COUNTS[counts], n_tokens)
    x_ND, gates = torch.randn(n_tokens, 24), gates_like(active)
    expected = loop_over_experts(experts, x_ND, gates * active)
    poison(experts, active)
    pairs = sorted_pairs(active, gates, room)
    assert_adds(lambda into: add_grouped_experts(into, experts, x_ND, pairs), expected)


@pytest.mark.parametrize("make", EXPERTS)
@torch.no_grad()
def test_experts_in_bfloat16(make: ExpertsFactory) -> None:
    experts = make(24, 5, 8)
    drawn(experts, "float32")
    experts.bfloat16()
    active = active_of(COUNTS["an odd one"], 23)
    x_ND, gates = torch.randn(23, 24).bfloat16(), gates_like(active)
    into = torch.zeros_like(x_ND)
    add_grouped_experts(into, experts, x_ND, sorted_pairs(active, gates, 0))
    assert_near(into.double(), loop_over_experts(experts, x_ND, gates * active), 2e-2)


@pytest.mark.parametrize(
    ("make", "weights", "n_groups", "context", "counts", "room"),
    pairwise(
        make=HEADS, weights=WEIGHTS, n_groups=[3, 5], context=CONTEXTS, counts=COUNTS, room=[0, 9]
    ),
)
@torch.no_grad()
def test_heads(
    make: Callable[..., HeadGroups],
    weights: str,
    n_groups: int,
    context: str,
    counts: str,
    room: int,
) -> None:
    heads = make(24, n_groups, 2, 6)
    drawn(heads, weights)
    seen = read(heads, context)
    active = active_of(COUNTS[counts][:n_groups], seen.x_BTD[..., 0].numel())
    gates = gates_like(active)
    expected = loop_over_heads(heads, seen, gates * active)
    poison(heads, active)
    pairs = sorted_pairs(active, gates, room)
    assert_adds(lambda into: add_grouped_heads(into, heads, *seen.attended, pairs), expected, 3e-6)


@torch.no_grad()
def test_sums_are_the_same_at_every_run_and_pass_over_what_is_undefined() -> None:
    active = torch.rand(40, 6) < 0.5
    gates = gates_like(active)
    pairs = sorted_pairs(active, gates, 5)
    out = torch.randn(len(pairs.token_P), 8)
    out[int(pairs.ends_E[-1]) :] = torch.nan
    expected = torch.stack(
        [
            sum((out[at] for at in places if at < pairs.ends_E[-1]), torch.zeros(8))
            for places in pairs.place_NK
        ]
    )
    assert_near(grouped_mm_layers.sum_of_pairs(out, pairs), expected)


@pytest.mark.parametrize(
    ("d_model", "d_expert", "dtype", "fits"),
    [
        (24, 8, torch.bfloat16, True),
        (24, 8, torch.float32, True),
        (24, 4, torch.float32, True),
        (24, 4, torch.bfloat16, False),
        (20, 8, torch.bfloat16, False),
        (24, 9, torch.float32, False),
    ],
)
def test_widths_of_whole_blocks_of_16_bytes_fit(
    d_model: int, d_expert: int, dtype: torch.dtype, fits: bool
) -> None:
    experts = EXPERTS[0](d_model, 3, d_expert)
    drawn(experts, "float32")
    experts.to(dtype)
    weights = experts.w_in, experts.w_out
    x_ND = torch.randn(4, d_model).to(dtype)
    assert grouped_mm_layers.fit(x_ND, *weights) == fits
    assert not grouped_mm_layers.fit(x_ND.half(), *weights)
    assert not grouped_mm_layers.is_possible(x_ND, *weights)  # on a CPU


def test_wrong_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert grouped_mm_layers.gives_right_products(cpu)
    right = F.grouped_mm

    def untransposed(x_PI: Tensor, w_EIO: Tensor, *, offs: Tensor) -> Tensor:
        mixed = w_EIO.mT.reshape(w_EIO.shape)
        return right(x_PI, mixed, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", untransposed)
    assert not grouped_mm_layers.gives_right_products(cpu)


def test_what_fails_or_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    works_on = grouped_mm_layers.works_on.__wrapped__
    cpu = torch.device("cpu")
    assert works_on(cpu)
    monkeypatch.setattr(grouped_mm_layers, "gives_right_products", lambda device: False)
    with pytest.warns(UserWarning, match="gives wrong products; experts run one by one"):
        assert not works_on(cpu)

    def fails(device: torch.device) -> bool:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(grouped_mm_layers, "gives_right_products", fails)
    with pytest.warns(UserWarning, match="fails: no kernel image"):
        assert not works_on(cpu)
    assert modes == ["default", 2] * 3
    for other in (8, 12):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=other: (of, 0))
        assert not works_on(cpu)


@pytest.mark.gpu
@torch.no_grad()
def test_transposed_views_are_multiplied_right() -> None:
    experts = EXPERTS[1](1024, 16, 256)
    drawn(experts, "float32")
    experts.to("cuda", torch.bfloat16)
    active = active_of([0, 700, 1, 64, *[300] * 11, 0], 700).cuda()
    x_ND, gates = torch.randn(700, 1024, device="cuda").bfloat16() / 32, gates_like(active.cpu())
    into = torch.zeros_like(x_ND)
    add_grouped_experts(into, experts, x_ND, sorted_pairs(active, gates.cuda(), 50))
    on_cpu = nn.Module.cpu(experts)
    expected = loop_over_experts(on_cpu, x_ND.cpu(), gates * active.cpu())
    assert_near(into.cpu().double(), expected, 2e-2)

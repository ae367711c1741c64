"""The model that the benchmarks of the sparse engine run, its dense twin, and their plans.

About 100 M parameters: 12 layers of width 768, 32 feed-forward experts of 128 hidden units, 8
attention experts of 2 heads.
"""

from functools import partial
from typing import Any

import torch

from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts, SelectionPlan, TopK
from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.experts import FeedForward
from lightning_dsmoe.metrics import count_parameters
from lightning_dsmoe.routing import AllExperts, routed_layers

VOCABULARY, WIDTH, LAYERS = 4096, 768, 12
N_EXPERTS, D_EXPERT = 32, 128
N_ATTENTION, N_HEADS, D_HEAD = 8, 2, 64

PLANS = {
    "P1": SelectionPlan(experts=TopK(11)),
    "P2": SelectionPlan(experts=TopK(9), attention=TopK(4)),
    "P3": SelectionPlan(experts=TopK(3), attention=TopK(2)),
}
"""P1: 11 of 32 feed-forward experts, all attention; P2: 34 %, P3: 15 % of the hidden parameters."""


def ds_moe(*, n_experts: int = N_EXPERTS, d_expert: int = D_EXPERT, **options: Any) -> Decoder:
    """The model, with random weights."""
    torch.manual_seed(0)
    decoder = Decoder(
        VOCABULARY,
        WIDTH,
        LAYERS,
        attention=partial(
            MixtureOfAttentionHeads, n_experts=N_ATTENTION, n_heads=N_HEADS, d_head=D_HEAD
        ),
        feed_forward=partial(MixtureOfExperts, n_experts=n_experts, d_expert=d_expert, **options),
    )
    return decoder.eval().requires_grad_(False)


def dense_twin() -> Decoder:
    """The same widths without routers."""
    torch.manual_seed(0)
    decoder = Decoder(
        VOCABULARY,
        WIDTH,
        LAYERS,
        attention=partial(
            GroupedQueryAttention,
            n_heads=N_ATTENTION * N_HEADS,
            n_kv_heads=N_HEADS,
            d_head=D_HEAD,
        ),
        feed_forward=partial(FeedForward, d_hidden=N_EXPERTS * D_EXPERT),
    )
    return decoder.eval().requires_grad_(False)


def active_bytes(
    decoder: Decoder, plan: SelectionPlan, *, expert_bytes: float = 4, other_bytes: float = 4
) -> float:
    """Bytes of weights that one token needs, the head included.

    Args:
        decoder: the model, not packed.
        plan: selections of which each runs a fixed number of experts.
        expert_bytes: bytes of a parameter of a routed expert.
        other_bytes: bytes of any other parameter.

    Raises:
        ValueError: if the number of experts under a selection varies.
    """
    counts = count_parameters(decoder)
    always = counts.always + decoder.vocab_size * decoder.d_model
    routed = 0
    for name, selection in plan.selections(routed_layers(decoder)).items():
        layer = counts.layers[name]
        if isinstance(selection, TopK):
            routed += selection.k * layer.per_expert
        elif isinstance(selection, AllExperts):
            routed += layer.n_experts * layer.per_expert
        else:
            raise ValueError(f"the number of experts under {selection} varies")
    return routed * expert_bytes + always * other_bytes


def hidden_share(decoder: Decoder, plan: SelectionPlan) -> float:
    """Share of the hidden parameters that run for a token under a plan of fixed numbers."""
    head = decoder.vocab_size * decoder.d_model
    active = active_bytes(decoder, plan, expert_bytes=1, other_bytes=1) - head
    return active / count_parameters(decoder).hidden


def operations(decoder: Decoder, plan: SelectionPlan, length: int, *, predicted: int = 1) -> float:
    """Floating-point operations of reading a text: two for each weight that runs for a token.

    Args:
        decoder: the model, not packed.
        plan: selections of which each runs a fixed number of experts.
        length: tokens of the text, each of which attends to those up to itself.
        predicted: tokens that the head runs on.
    """
    head = decoder.vocab_size * decoder.d_model
    weights = active_bytes(decoder, plan, expert_bytes=1, other_bytes=1) - head
    channels = 0
    for block, selection in zip(decoder.blocks, decoder.selections(plan).attention, strict=True):
        heads = block.attention.heads
        n_groups = selection.k if isinstance(selection, TopK) else heads.n_groups
        channels += n_groups * heads.n_heads * heads.d_head
    attention = 2 * 2 * channels * (length + 1) / 2
    return length * (2 * weights + attention) + predicted * 2 * head

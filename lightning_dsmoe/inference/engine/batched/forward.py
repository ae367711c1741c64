"""A packed decoder on many tokens.

Shapes: B batch, T new tokens, X = B T, D width, E experts, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention, KVCache, MixtureOfAttentionHeads
from lightning_dsmoe.attention.attention import Scope, causal_scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.decoder import Block, Decoder, DecoderOutput, Routings
from lightning_dsmoe.experts import Experts, FeedForward, MixtureOfExperts
from lightning_dsmoe.inference.engine.batched.grouped_layers import (
    Pairs,
    add_grouped_experts,
    add_grouped_heads,
    grouping_pays,
    pair_up,
)
from lightning_dsmoe.inference.engine.batched.masked_layers import add_wide_experts, add_wide_heads
from lightning_dsmoe.inference.engine.weights.row_major import as_row_major
from lightning_dsmoe.routing import AllExperts, Routing, Selection, SelectionPlan
from lightning_dsmoe.routing.removed import select
from lightning_dsmoe.routing.routing import MixtureOutput


def run_many(
    decoder: Decoder,
    tokens_BT: Tensor,
    plan: SelectionPlan,
    *,
    grouped: bool,
    mask: Tensor | None = None,
    caches: Sequence[KVCache] | None = None,
    only_last: bool = False,
) -> DecoderOutput:
    """Logits and routings of new tokens, as `Decoder.forward` gives them.

    Args:
        decoder: the packed decoder.
        tokens_BT: new tokens, those that follow what the caches hold.
        plan: the experts that run in each layer.
        grouped: run each expert on its own tokens only, in layers where that pays, instead of all
            on all under zero gates.
        mask: bool `[B, T]`, false for padding (on the left); None for no padding.
        caches: one KV cache per layer, to which the new tokens are added.
        only_last: give the logits of the last position only, `[B, 1, V]`.
    """
    x = decoder.embed(tokens_BT, mask=mask, caches=caches)
    scope = causal_scope(x, mask, caches[0] if caches else None)
    experts, attention = [], []
    for layer, block in enumerate(cast(Iterable[Block], decoder.blocks)):
        cache = None if caches is None else caches[layer]
        attention.append(_attend(x, block, plan.attention[layer], grouped, scope, cache, mask))
        experts.append(_feed(x, block, plan.experts[layer], grouped))
    x = decoder.norm(x[:, -1:] if only_last else x)
    return DecoderOutput(decoder.head(x), Routings(tuple(experts), tuple(attention)))


def _attend(
    into_BTD: Tensor,
    block: Block,
    selection: Selection,
    grouped: bool,
    scope: Scope,
    cache: KVCache | None,
    mask: Tensor | None,
) -> Routing | None:
    """Add the attention of a block to the residual stream, in place."""
    layer, x_BTD = block.attention, _normed(block.attention_norm, into_BTD)
    if type(layer) not in (MixtureOfAttentionHeads, GroupedQueryAttention):
        mixture: MixtureOutput = layer(x_BTD, selection, mask=mask, cache=cache)
        into_BTD += mixture.output
        return mixture.routing
    into_XD = into_BTD.view(-1, into_BTD.shape[-1])
    heads = cast(HeadGroups, layer.heads)
    keys, values = heads.keys_and_values(x_BTD, scope, cache, mask)
    attended = heads, x_BTD, scope, keys, values
    if not isinstance(layer, MixtureOfAttentionHeads):
        add_wide_heads(into_XD, *attended, None)
        return None
    routing: Routing = layer.router(x_BTD)
    work = _weights_of_one(heads.w_q, heads.w_o)
    work += 2 * keys.shape[2] * heads.n_heads * heads.d_head
    gates_XE, pairs = _gates(routing, selection, layer, grouped, work, into_XD.shape[1])
    if pairs is None:
        add_wide_heads(into_XD, *attended, gates_XE)
    else:
        add_grouped_heads(into_XD, *attended, pairs)
    return routing


def _normed(norm: nn.Module, stream_BTD: Tensor) -> Tensor:
    """The normalised stream in memory of its own, also from a norm that gives out what it gets."""
    x_BTD: Tensor = norm(stream_BTD)
    return x_BTD.clone() if x_BTD.data_ptr() == stream_BTD.data_ptr() else x_BTD


def _feed(into_BTD: Tensor, block: Block, selection: Selection, grouped: bool) -> Routing | None:
    """Add the feed-forward layer of a block to the residual stream, in place."""
    layer, x_BTD = block.feed_forward, _normed(block.feed_forward_norm, into_BTD)
    if type(layer) not in (MixtureOfExperts, FeedForward):
        mixture: MixtureOutput = layer(x_BTD, selection)
        into_BTD += mixture.output
        return mixture.routing
    into_XD, x_XD = into_BTD.view(-1, into_BTD.shape[-1]), x_BTD.flatten(0, 1)
    if not isinstance(layer, MixtureOfExperts):
        add_wide_experts(into_XD, cast(Experts, layer.experts), x_XD, None)
        return None
    routing: Routing = layer.router(x_BTD)
    work = _weights_of_one(layer.experts.w_in, layer.experts.w_out)
    gates_XE, pairs = _gates(routing, selection, layer, grouped, work, into_XD.shape[1])
    if pairs is None:
        add_wide_experts(into_XD, layer.experts, x_XD, gates_XE)
    else:
        add_grouped_experts(into_XD, layer.experts, x_XD, pairs)
    if layer.shared is not None:
        add_wide_experts(into_XD, layer.shared.experts, x_XD, None)
    return routing


def _weights_of_one(*weights: nn.Module) -> int:
    """The number of weights of one expert."""
    return sum(as_row_major(weight).weight.shape[1:].numel() for weight in weights)


def _gates(
    routing: Routing,
    selection: Selection,
    layer: MixtureOfExperts | MixtureOfAttentionHeads,
    grouped: bool,
    work: int,
    width: int,
) -> tuple[Tensor, Pairs | None]:
    """Gates `[X, E]`, and the pairs that run if only those are to run.

    Work is the number of multiplications of one expert for one token.
    """
    gates, active = select(selection, routing, layer.remaining)
    gates_XE = (layer.gate_factor * gates).flatten(0, -2)
    if isinstance(selection, AllExperts) or not grouped:
        return gates_XE, None
    active_XE = active.flatten(0, -2)
    counts = active_XE.sum(0).tolist()
    n_experts = routing.probs.shape[-1]
    on_cpu = active_XE.device.type == "cpu"
    if on_cpu and not grouping_pays(counts, len(active_XE), n_experts, work, width):
        return gates_XE, None
    return gates_XE, pair_up(gates_XE, active_XE, counts)

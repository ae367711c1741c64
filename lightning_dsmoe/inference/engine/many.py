"""A packed decoder on many tokens.

Shapes: B batch, T new tokens, X = B T, D width, E experts, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor

from lightning_dsmoe.attention import Attention, GroupedQueryAttention, KVCache, MixtureOfAttentionHeads
from lightning_dsmoe.attention.attention import Scope, causal_scope
from lightning_dsmoe.decoder import Block, Decoder, DecoderOutput, Routings
from lightning_dsmoe.experts import FeedForward, FeedForwardLayer, MixtureOfExperts
from lightning_dsmoe.inference.engine.grouped import Pairs, grouped_experts, grouped_heads, pair_up
from lightning_dsmoe.inference.engine.wide import wide_experts, wide_heads
from lightning_dsmoe.routing import AllExperts, MixtureOutput, Routing, Selection, SelectionPlan


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
        grouped: run each expert on its own tokens only, instead of all on all under zero gates.
        mask: bool `[B, T]`, false for padding (on the left); None for no padding.
        caches: one KV cache per layer, to which the new tokens are added.
        only_last: give the logits of the last position only, `[B, 1, V]`.
    """
    x = decoder.embedding(tokens_BT)
    scope = causal_scope(x, mask, caches[0] if caches else None)
    if decoder.positions is not None:
        x = x + decoder.positions(scope.positions_BT)
    experts, attention = [], []
    for layer, block in enumerate(cast(Iterable[Block], decoder.blocks)):
        cache = None if caches is None else caches[layer]
        attended = _attend(
            block.attention, block.attention_norm(x), plan.attention[layer], grouped, scope, cache, mask
        )
        x = x + attended.output
        fed = _feed(block.feed_forward, block.feed_forward_norm(x), plan.experts[layer], grouped)
        x = x + fed.output
        experts.append(fed.routing)
        attention.append(attended.routing)
    x = decoder.norm(x[:, -1:] if only_last else x)
    return DecoderOutput(decoder.head(x), Routings(tuple(experts), tuple(attention)))


def _attend(
    layer: Attention,
    x_BTD: Tensor,
    selection: Selection,
    grouped: bool,
    scope: Scope,
    cache: KVCache | None,
    mask: Tensor | None,
) -> MixtureOutput:
    if not isinstance(layer, MixtureOfAttentionHeads | GroupedQueryAttention):
        return layer(x_BTD, selection, mask=mask, cache=cache)
    if isinstance(layer, GroupedQueryAttention):
        keys, values = layer.heads.keys_and_values(x_BTD, scope, cache, mask)
        y_XD = wide_heads(layer.heads, x_BTD, scope, keys, values, None)
        return MixtureOutput(y_XD.view_as(x_BTD), None)
    routing = layer.router(x_BTD)
    gates_XE, pairs = _gates(routing, selection, layer.gate_factor, grouped)
    keys, values = layer.heads.keys_and_values(x_BTD, scope, cache, mask)
    if pairs is None:
        y_XD = wide_heads(layer.heads, x_BTD, scope, keys, values, gates_XE)
    else:
        y_XD = grouped_heads(layer.heads, x_BTD, scope, keys, values, pairs)
    return MixtureOutput(y_XD.view_as(x_BTD), routing)


def _feed(
    layer: FeedForwardLayer, x_BTD: Tensor, selection: Selection, grouped: bool
) -> MixtureOutput:
    if not isinstance(layer, MixtureOfExperts | FeedForward):
        return layer(x_BTD, selection)
    x_XD = x_BTD.flatten(0, 1)
    if isinstance(layer, FeedForward):
        return MixtureOutput(wide_experts(layer.experts, x_XD, None).view_as(x_BTD), None)
    routing = layer.router(x_BTD)
    gates_XE, pairs = _gates(routing, selection, layer.gate_factor, grouped)
    if pairs is None:
        y_XD = wide_experts(layer.experts, x_XD, gates_XE)
    else:
        y_XD = grouped_experts(layer.experts, x_XD, pairs)
    if layer.shared is not None:
        y_XD = y_XD + wide_experts(layer.shared.experts, x_XD, None)
    return MixtureOutput(y_XD.view_as(x_BTD), routing)


def _gates(
    routing: Routing, selection: Selection, factor: float, grouped: bool
) -> tuple[Tensor, Pairs | None]:
    """Gates `[X, E]`, and the pairs that run if only those are to run."""
    gates, active = selection(routing.probs)
    gates_XE = (factor * gates).flatten(0, -2)
    if isinstance(selection, AllExperts) or not grouped:
        return gates_XE, None
    return gates_XE, pair_up(gates_XE, active.flatten(0, -2))

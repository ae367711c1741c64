"""A packed decoder on many tokens: prompts, evaluation, and decoding of large batches.

Shapes: B sequences in a batch, T new positions, S positions so far, N = B T tokens, D width,
E experts, H KV heads, C head width, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention, KVCache, MixtureOfAttentionHeads
from lightning_dsmoe.attention.attention import Scope, causal_scope
from lightning_dsmoe.decoder import Block, Decoder, DecoderOutput, Routings
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts
from lightning_dsmoe.inference.engine.batched import grouped_layers, masked_layers
from lightning_dsmoe.inference.engine.batched.grouped_layers import Pairs
from lightning_dsmoe.inference.engine.weights.row_major import as_row_major
from lightning_dsmoe.routing import AllExperts, MixtureOutput, Routing, Selection, SelectionPlan
from lightning_dsmoe.routing.removed import select

# These very classes: a subclass may have a forward of its own, which is then called as it is.
_ATTENTION = (GroupedQueryAttention, MixtureOfAttentionHeads)
_FEED_FORWARD = (FeedForward, MixtureOfExperts)


def forward_tokens(
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
        grouped: run each expert on its own tokens only, in layers where that is estimated to be
            faster, instead of all experts on all tokens under gates of zero.
        mask: bool `[B, T]`, false for padding (on the left); None for no padding.
        caches: one KV cache per layer, to which the new tokens are added.
        only_last: compute the logits of the last position only, `[B, 1, V]`.
    """
    # The residual stream is updated in place: experts add their outputs to its rows one after
    # another, without a tensor of outputs for each layer that is zeroed first and added afterwards.
    residual_BTD = decoder.embed(tokens_BT, mask=mask, caches=caches)
    scope = causal_scope(residual_BTD, mask, caches[0] if caches else None)
    experts, attention = [], []
    for layer, block in enumerate(cast(Iterable[Block], decoder.blocks)):
        seen = scope, mask, None if caches is None else caches[layer]
        selection = plan.attention[layer]
        attention.append(_add_attention(residual_BTD, block, selection, *seen, grouped=grouped))
        experts.append(_add_feed_forward(residual_BTD, block, plan.experts[layer], grouped=grouped))
    x_BTD = decoder.norm(residual_BTD[:, -1:] if only_last else residual_BTD)
    return DecoderOutput(decoder.head(x_BTD), Routings(tuple(experts), tuple(attention)))


def _add_attention(
    residual_BTD: Tensor,
    block: Block,
    selection: Selection,
    scope: Scope,
    mask: Tensor | None,
    cache: KVCache | None,
    *,
    grouped: bool,
) -> Routing | None:
    layer = cast(MixtureOfAttentionHeads, block.attention)
    x_BTD = _normalized(block.attention_norm, residual_BTD)
    if type(layer) not in _ATTENTION:
        return _add_output(residual_BTD, layer(x_BTD, selection, mask=mask, cache=cache))
    heads = layer.heads
    keys_BHSC, values_BHSC = heads.keys_and_values(x_BTD, scope, cache, mask)
    attended = heads, x_BTD, scope, keys_BHSC, values_BHSC
    scores_and_sums = 2 * keys_BHSC.shape[2] * heads.n_heads * heads.d_head
    macs = _weights_per_expert(heads.w_q, heads.w_o) + scores_and_sums
    routing, gates = _route(layer, x_BTD, selection, grouped=grouped, macs=macs)
    residual_ND = residual_BTD.view(-1, residual_BTD.shape[-1])
    if isinstance(gates, Pairs):
        grouped_layers.add_grouped_heads(residual_ND, *attended, gates)
    else:
        masked_layers.add_masked_heads(residual_ND, *attended, gates)
    return routing


def _add_feed_forward(
    residual_BTD: Tensor, block: Block, selection: Selection, *, grouped: bool
) -> Routing | None:
    layer = cast(MixtureOfExperts, block.feed_forward)
    x_BTD = _normalized(block.feed_forward_norm, residual_BTD)
    if type(layer) not in _FEED_FORWARD:
        return _add_output(residual_BTD, layer(x_BTD, selection))
    macs = _weights_per_expert(layer.experts.w_in, layer.experts.w_out)
    routing, gates = _route(layer, x_BTD, selection, grouped=grouped, macs=macs)
    residual_ND, x_ND = residual_BTD.view(-1, residual_BTD.shape[-1]), x_BTD.flatten(0, 1)
    if isinstance(gates, Pairs):
        grouped_layers.add_grouped_experts(residual_ND, layer.experts, x_ND, gates)
    else:
        masked_layers.add_masked_experts(residual_ND, layer.experts, x_ND, gates)
    if isinstance(layer, MixtureOfExperts) and layer.shared is not None:
        masked_layers.add_masked_experts(residual_ND, layer.shared.experts, x_ND, None)
    return routing


def _normalized(norm: nn.Module, residual_BTD: Tensor) -> Tensor:
    """The normalized tokens, in memory of their own.

    Layers read them while they add to the residual stream, so after a norm that returns its input,
    such as `nn.Identity`, they would read their own outputs.
    """
    x_BTD: Tensor = norm(residual_BTD)
    storages = (tensor.untyped_storage().data_ptr() for tensor in (x_BTD, residual_BTD))
    return x_BTD.clone() if len({*storages}) == 1 else x_BTD


def _add_output(residual_BTD: Tensor, output: MixtureOutput) -> Routing | None:
    """Add what a layer of another class computes by itself."""
    residual_BTD += output.output
    return output.routing


def _weights_per_expert(*weights: nn.Module) -> int:
    return sum(as_row_major(weight).weight.shape[1:].numel() for weight in weights)


def _route(
    layer: nn.Module, x_BTD: Tensor, selection: Selection, *, grouped: bool, macs: int
) -> tuple[Routing | None, Tensor | Pairs | None]:
    """The routing of a layer's tokens, and the gates under which its experts run.

    Args:
        layer: a layer with or without a router.
        x_BTD: its tokens, normalized.
        selection: the experts that run.
        grouped: whether each expert may run on its own tokens only.
        macs: multiply-accumulates of one expert for one token.

    Returns:
        Gates `[N, E]` to run all experts, `Pairs` to run each expert on its own tokens, and None
        for a layer without a router.
    """
    if not isinstance(layer, MixtureOfExperts | MixtureOfAttentionHeads):
        return None, None
    routing: Routing = layer.router(x_BTD)
    gates, active = select(selection, routing, layer.remaining)
    gates_NE = (layer.gate_factor * gates).flatten(0, -2)
    if isinstance(selection, AllExperts) or not grouped:
        return routing, gates_NE
    active_NE = active.flatten(0, -2)
    counts = active_NE.sum(0).tolist()
    sizes = len(active_NE), routing.probs.shape[-1], macs, x_BTD.shape[-1]
    on_cpu = active_NE.device.type == "cpu"
    if on_cpu and not grouped_layers.grouping_pays(counts, *sizes):
        return routing, gates_NE
    return routing, grouped_layers.sort_by_expert(gates_NE, active_NE, counts)

"""A packed decoder on many tokens: prompts, evaluation, and decoding of large batches.

Shapes: B sequences in a batch, T new positions, N = B T tokens, D width, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention, KVCache, MixtureOfAttentionHeads
from lightning_dsmoe.attention.attention import Scope, attention_scope
from lightning_dsmoe.decoder import Block, Decoder, DecoderOutput, Routings
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts
from lightning_dsmoe.inference.engine.batched import mixtures
from lightning_dsmoe.routing import MixtureOutput, Routing, Selection, SelectionPlan

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
    scope = attention_scope(residual_BTD, mask, caches[0] if caches else None)
    selections = decoder.selections(plan)
    experts, attention = [], []
    for layer, block in enumerate(cast(Iterable[Block], decoder.blocks)):
        seen = scope, mask, None if caches is None else caches[layer]
        selection = selections.attention[layer]
        attention.append(_add_attention(residual_BTD, block, selection, *seen, grouped=grouped))
        experts.append(
            _add_feed_forward(residual_BTD, block, selections.experts[layer], grouped=grouped)
        )
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
    residual_ND = residual_BTD.view(-1, residual_BTD.shape[-1])
    seen = scope, mask, cache
    return mixtures.add_attention(residual_ND, layer, x_BTD, selection, *seen, grouped=grouped)


def _add_feed_forward(
    residual_BTD: Tensor, block: Block, selection: Selection, *, grouped: bool
) -> Routing | None:
    layer = cast(MixtureOfExperts, block.feed_forward)
    x_BTD = _normalized(block.feed_forward_norm, residual_BTD)
    if type(layer) not in _FEED_FORWARD:
        return _add_output(residual_BTD, layer(x_BTD, selection))
    residual_ND = residual_BTD.view(-1, residual_BTD.shape[-1])
    return mixtures.add_feed_forward(residual_ND, layer, x_BTD, selection, grouped=grouped)


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

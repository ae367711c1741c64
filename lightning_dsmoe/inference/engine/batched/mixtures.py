"""One packed layer on many tokens, with the faster of two methods.

Shapes: B sequences in a batch, T new positions, S positions so far, N tokens, D width, E experts,
H KV heads, C head width; leading dimensions of tokens that are called x are free.
"""

from torch import Tensor

from lightning_dsmoe.attention import GroupedQueryAttention, KVCache, MixtureOfAttentionHeads
from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts
from lightning_dsmoe.inference.engine.batched import (
    grouped_layers,
    grouped_mm_layers,
    masked_layers,
)
from lightning_dsmoe.inference.engine.batched.grouped_layers import Pairs
from lightning_dsmoe.inference.engine.batched.pairs_on_device import PairsOnDevice
from lightning_dsmoe.inference.engine.batched.route import route
from lightning_dsmoe.routing import Routing, Selection


def add_attention(
    residual_ND: Tensor,
    layer: GroupedQueryAttention | MixtureOfAttentionHeads,
    x_BTD: Tensor,
    selection: Selection,
    scope: Scope,
    mask: Tensor | None,
    cache: KVCache | None,
    *,
    grouped: bool,
) -> Routing | None:
    """Add the output of attention to the residual stream, in place.

    Args:
        residual_ND: the residual stream.
        layer: the layer, packed.
        x_BTD: its tokens.
        selection: the experts that run.
        scope: which positions attend to which.
        mask: bool `[B, T]`, false for padding; None for no padding.
        cache: keys and values of earlier tokens; the new ones are added to it.
        grouped: whether each expert may run on its own tokens only.

    Returns:
        The routing; None for a layer without a router.
    """
    heads = layer.heads
    n_keys = x_BTD.shape[1] + (0 if cache is None else cache.length)
    scores_and_sums = 2 * n_keys * heads.n_heads * heads.d_head
    weights = heads.w_q, heads.w_o
    routing, gates = route(
        layer, x_BTD, selection, weights, grouped=grouped, more_macs=scores_and_sums
    )
    # After the selection, which may be impossible and must then leave the cache as it is.
    attended = heads, x_BTD, scope, *heads.keys_and_values(x_BTD, scope, cache, mask)
    if isinstance(gates, Pairs):
        grouped_layers.add_grouped_heads(residual_ND, *attended, gates)
    elif isinstance(gates, PairsOnDevice):
        grouped_mm_layers.add_grouped_heads(residual_ND, *attended, gates)
    else:
        masked_layers.add_masked_heads(residual_ND, *attended, gates)
    return routing


def add_feed_forward(
    residual_ND: Tensor,
    layer: FeedForward | MixtureOfExperts,
    x: Tensor,
    selection: Selection,
    *,
    grouped: bool,
) -> Routing | None:
    """Add the output of a feed-forward layer to the residual stream, in place.

    Args:
        residual_ND: the residual stream.
        layer: the layer, packed.
        x: its tokens, `[..., D]`.
        selection: the experts that run.
        grouped: whether each expert may run on its own tokens only.

    Returns:
        The routing; None for a layer without a router.
    """
    x_ND = x.reshape(residual_ND.shape)
    weights = layer.experts.w_in, layer.experts.w_out
    routing, gates = route(layer, x, selection, weights, grouped=grouped)
    if isinstance(gates, Pairs):
        grouped_layers.add_grouped_experts(residual_ND, layer.experts, x_ND, gates)
    elif isinstance(gates, PairsOnDevice):
        grouped_mm_layers.add_grouped_experts(residual_ND, layer.experts, x_ND, gates)
    else:
        masked_layers.add_masked_experts(residual_ND, layer.experts, x_ND, gates)
    if isinstance(layer, MixtureOfExperts) and layer.shared is not None:
        gate_N1 = None if layer.shared_gate is None else layer.shared_gate(x_ND).sigmoid()
        masked_layers.add_masked_experts(residual_ND, layer.shared.experts, x_ND, gate_N1)
    return routing

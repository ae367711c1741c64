"""One packed layer on many tokens, with the faster of two methods.

Shapes: B sequences in a batch, T new positions, S positions so far, N tokens, D width, E experts,
H KV heads, C head width; leading dimensions of tokens that are called x are free.
"""

from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention, KVCache, MixtureOfAttentionHeads
from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts
from lightning_dsmoe.inference.engine.batched import grouped_layers, masked_layers
from lightning_dsmoe.inference.engine.batched.grouped_layers import Pairs
from lightning_dsmoe.inference.engine.weights.row_major import as_row_major
from lightning_dsmoe.routing import AllExperts, Routing, Selection
from lightning_dsmoe.routing.removed import select


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
    macs = _weights_per_expert(heads.w_q, heads.w_o) + scores_and_sums
    routing, gates = _route(layer, x_BTD, selection, grouped=grouped, macs=macs)
    # After the selection, which may be impossible and must then leave the cache as it is.
    attended = heads, x_BTD, scope, *heads.keys_and_values(x_BTD, scope, cache, mask)
    if isinstance(gates, Pairs):
        grouped_layers.add_grouped_heads(residual_ND, *attended, gates)
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
    macs = _weights_per_expert(layer.experts.w_in, layer.experts.w_out)
    routing, gates = _route(layer, x, selection, grouped=grouped, macs=macs)
    if isinstance(gates, Pairs):
        grouped_layers.add_grouped_experts(residual_ND, layer.experts, x_ND, gates)
    else:
        masked_layers.add_masked_experts(residual_ND, layer.experts, x_ND, gates)
    if isinstance(layer, MixtureOfExperts) and layer.shared is not None:
        gate_N1 = None if layer.shared_gate is None else layer.shared_gate(x_ND).sigmoid()
        masked_layers.add_masked_experts(residual_ND, layer.shared.experts, x_ND, gate_N1)
    return routing


def _weights_per_expert(*weights: nn.Module) -> int:
    return sum(as_row_major(weight).weight.shape[1:].numel() for weight in weights)


def _route(
    layer: nn.Module, x: Tensor, selection: Selection, *, grouped: bool, macs: int
) -> tuple[Routing | None, Tensor | Pairs | None]:
    """The routing of a layer's tokens, and the gates under which its experts run.

    Args:
        layer: a layer with or without a router.
        x: its tokens, `[..., D]`.
        selection: the experts that run.
        grouped: whether each expert may run on its own tokens only.
        macs: multiply-accumulates of one expert for one token.

    Returns:
        Gates `[N, E]` to run all experts, `Pairs` to run each expert on its own tokens, and None
        for a layer without a router.
    """
    if not isinstance(layer, MixtureOfExperts | MixtureOfAttentionHeads):
        return None, None
    routing: Routing = layer.router(x)
    gates, active = select(selection, routing, layer.remaining)
    gates_NE = (layer.gate_factor * gates).reshape(-1, gates.shape[-1])
    if isinstance(selection, AllExperts) or not grouped:
        return routing, gates_NE
    active_NE = active.reshape(gates_NE.shape)
    counts = active_NE.sum(0).tolist()
    sizes = len(active_NE), routing.probs.shape[-1], macs, x.shape[-1]
    on_cpu = active_NE.device.type == "cpu"
    if on_cpu and not grouped_layers.grouping_pays(counts, *sizes):
        return routing, gates_NE
    return routing, grouped_layers.sort_by_expert(gates_NE, active_NE, counts)

"""Which experts run for a layer's tokens, and by which of the methods for many tokens.

Shapes: N tokens, E experts, K active experts, at most, of one token; leading dimensions of tokens
that are called x are free.
"""

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.inference.engine.batched import gpu_costs, grouped_layers, grouped_mm_layers
from lightning_dsmoe.inference.engine.batched.grouped_layers import Pairs
from lightning_dsmoe.inference.engine.batched.pairs_on_device import (
    PairsOnDevice,
    most_experts,
    sort_on_device,
)
from lightning_dsmoe.inference.engine.weights.row_major import as_row_major
from lightning_dsmoe.routing import AllExperts, Routing, Selection, TopK
from lightning_dsmoe.routing.removed import select


def route(
    layer: nn.Module,
    x: Tensor,
    selection: Selection,
    weights: tuple[nn.Module, ...],
    *,
    grouped: bool,
    more_macs: int = 0,
) -> tuple[Routing | None, Tensor | Pairs | PairsOnDevice | None]:
    """The routing of a layer's tokens, and the gates under which its experts run.

    Args:
        layer: a layer with or without a router.
        x: its tokens, `[..., D]`.
        selection: the experts that run.
        weights: its row-major weights.
        grouped: whether each expert may run on its own tokens only.
        more_macs: multiply-accumulates of one expert for one token without those of weights.

    Returns:
        Gates `[N, E]` to run all experts, pairs to run each expert on its own tokens, and None for
        a layer without a router.
    """
    if not isinstance(layer, MixtureOfExperts | MixtureOfAttentionHeads):
        return None, None
    routing: Routing = layer.router(x)
    gates, active = select(selection, routing, layer.remaining)
    gates_NE = (layer.gate_factor * gates).reshape(-1, gates.shape[-1])
    if isinstance(selection, AllExperts) or not grouped or not len(gates_NE):
        return routing, gates_NE
    active_NE = active.reshape(gates_NE.shape)
    macs = more_macs + sum(as_row_major(w).weight.shape[1:].numel() for w in weights)
    sizes = len(active_NE), routing.probs.shape[-1], macs, x.shape[-1]
    in_one_product = grouped_mm_layers.is_possible(x, *weights)
    if active_NE.device.type == "cpu" and not in_one_product:
        counts = active_NE.sum(0).tolist()
        if not grouped_layers.grouping_pays(counts, *sizes):
            return routing, gates_NE
        return routing, grouped_layers.sort_by_expert(gates_NE, active_NE, counts)
    n_kernels = gpu_costs.kernels(active_NE.shape[1], in_one_product=in_one_product)
    if not gpu_costs.grouping_pays(len(active_NE), n_kernels, *sizes):
        return routing, gates_NE  # not even if each token ran one expert
    if in_one_product:
        n_pairs, most = _known_sizes(selection, active_NE, routing.probs.shape[-1])
        if gpu_costs.grouping_pays(n_pairs, n_kernels, *sizes):
            return routing, sort_on_device(gates_NE, active_NE, n_pairs=n_pairs, most=most)
        return routing, gates_NE
    counts = active_NE.sum(0).tolist()
    if gpu_costs.grouping_pays(sum(counts), n_kernels, *sizes):
        return routing, grouped_layers.sort_by_expert(gates_NE, active_NE, counts)
    return routing, gates_NE


def _known_sizes(selection: Selection, active_NE: Tensor, n_experts: int) -> tuple[int, int]:
    """Pairs of all tokens and the most experts K of one: both at least as many as run.

    They follow from the selection where it bounds them well. Most thresholds do not, such as any
    below 2: one may run a few experts for most tokens and all for some. Those sizes are then
    waited for, once in a layer.
    """
    most = most_experts(selection, n_experts)
    if most is not None and (type(selection) is TopK or 2 * most <= n_experts):
        most = min(most, active_NE.shape[1])
        return len(active_NE) * most, most
    counts_N = active_NE.sum(1)
    n_pairs, most = torch.stack([counts_N.sum(), counts_N.amax()]).tolist()
    return n_pairs, most

"""Layers on one new token of each of a few sequences, reading the active experts' weights only.

Shapes: B sequences, one new token of each; D model width, K active experts, R rows of a weight,
F expert width, H KV heads, S positions so far, C head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.attention.head_norm import HeadNorm
from lightning_dsmoe.attention.rotary import Rotation, rotate
from lightning_dsmoe.experts import Experts, FeedForward, MixtureOfExperts
from lightning_dsmoe.inference.engine.decode.expert_choice import ChosenExperts, choose_experts
from lightning_dsmoe.inference.engine.weights.matvec import materialize, with_matvec_linears
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights, take_experts
from lightning_dsmoe.inference.engine.weights.tiled import TiledWeights
from lightning_dsmoe.routing import AllExperts, MixtureOutput, Routing, Selection


class LayerSlots(NamedTuple):
    """The KV cache of one layer, and the slot that the new tokens are written to.

    Shape:
        keys_SBHC: keys.
        values_SBHC: values.
        seen_SB: bool, the slots that hold a token and not padding, the new ones among them.
        at_1: int64, the slot of the new tokens.
    """

    keys_SBHC: Tensor
    values_SBHC: Tensor
    seen_SB: Tensor
    at_1: Tensor


def choose(
    layer: nn.Module, selection: Selection, x_BD: Tensor
) -> tuple[Routing | None, ChosenExperts]:
    """The routing of a layer's tokens, and the experts that run; all for one without a router."""
    if isinstance(layer, MixtureOfExperts | MixtureOfAttentionHeads):
        routing: Routing = with_matvec_linears(layer.router, x_BD)
        chosen = choose_experts(selection, routing, layer.remaining)
        return routing, ChosenExperts(chosen.experts_K, chosen.gates_KB * layer.gate_factor)
    n_groups = layer.heads.n_groups if isinstance(layer, GroupedQueryAttention) else 1
    return None, ChosenExperts(None, torch.ones(n_groups, x_BD.shape[0], device=x_BD.device))


def gather_feed_forward(
    layer: MixtureOfExperts | FeedForward, selection: Selection, x_BD: Tensor
) -> MixtureOutput:
    """A feed-forward layer on a few tokens, in at least float32.

    Args:
        layer: the layer, packed.
        selection: the experts that run.
        x_BD: tokens, materialized.
    """
    routing, chosen = choose(layer, selection, x_BD)
    y_BD = gather_experts(layer.experts, x_BD, chosen)
    if isinstance(layer, MixtureOfExperts) and layer.shared is not None:
        _, all_shared = choose(layer.shared, AllExperts(), x_BD)
        if layer.shared_gate is not None:
            gates_B1 = with_matvec_linears(layer.shared_gate, x_BD).sigmoid()
            all_shared = ChosenExperts(None, materialize(gates_B1.T))
        y_BD = y_BD + gather_experts(layer.shared.experts, x_BD, all_shared)
    return MixtureOutput(y_BD, routing)


def gather_experts(experts: Experts, x_BD: Tensor, chosen: ChosenExperts) -> Tensor:
    """Sum of the active experts' outputs times their gates: `[B, D]`.

    Every expert that any token needs runs for all tokens, under gates of zero where a token does
    not need it: its weights are read anyway, and decoding takes the time of reading them.
    """
    projected_KBR = _packed(experts.w_in).project(x_BD, chosen.experts_K)
    if experts.b_in is not None:
        projected_KBR = projected_KBR + take_experts(experts.b_in, chosen.experts_K)[:, None]
    hidden_KBF = experts.hidden(materialize(projected_KBR)) * chosen.gates_KB[..., None]
    y_BD = _packed(experts.w_out).project_and_sum(hidden_KBF, chosen.experts_K)
    return y_BD if experts.b_out is None else y_BD + experts.b_out


def gather_heads(
    heads: HeadGroups,
    x_BD: Tensor,
    chosen: ChosenExperts,
    rotary: Rotation | None,
    slots: LayerSlots,
) -> Tensor:
    """Attention with the active groups of heads: `[B, D]`.

    Args:
        heads: the layer's heads.
        x_BD: new tokens.
        chosen: the groups that run.
        rotary: rotation of queries and keys, `[B, 1, R]` of R channels; None for none.
        slots: what the tokens attend to, to which their own keys and values are written.
    """
    kv_B2HC = with_matvec_linears(heads.kv, x_BD).unflatten(-1, (2, heads.n_heads, heads.d_head))
    keys_BHC = heads.k_norm(kv_B2HC[:, 0])
    q_KBR = _packed(heads.w_q).project(x_BD, chosen.experts_K)
    if heads.b_q is not None:
        q_KBR = q_KBR + take_experts(heads.b_q, chosen.experts_K)[:, None]
    q_KBHC = _normalized(heads, q_KBR.unflatten(-1, (heads.n_heads, heads.d_head)))
    if rotary is not None:
        keys_BHC, q_KBHC = rotate(keys_BHC, rotary), rotate(q_KBHC, rotary)
    slots.keys_SBHC.index_copy_(0, slots.at_1, keys_BHC[None].to(slots.keys_SBHC.dtype))
    slots.values_SBHC.index_copy_(0, slots.at_1, kv_B2HC[None, :, 1].to(slots.values_SBHC.dtype))
    heads_KBHC = _attend(materialize(q_KBHC), slots)
    gated_KBR = (heads_KBHC * chosen.gates_KB[..., None, None]).flatten(-2)
    y_BD = _packed(heads.w_o).project_and_sum(gated_KBR, chosen.experts_K)
    return y_BD if heads.b_o is None else y_BD + heads.b_o


def _normalized(heads: HeadGroups, q_KBHC: Tensor) -> Tensor:
    """Queries after their norm: over each head, or over all heads of all groups of a token."""
    if isinstance(heads.q_norm, HeadNorm) and len(heads.q_norm.normalized_shape) > 1:
        normed_BKHC: Tensor = heads.q_norm(materialize(q_KBHC.transpose(0, 1)))
        return normed_BKHC.transpose(0, 1)
    normed_KBHC: Tensor = heads.q_norm(q_KBHC)
    return normed_KBHC


def _attend(q_KBHC: Tensor, slots: LayerSlots) -> Tensor:
    """Softmax attention to all positions seen.

    As sums over broadcast products, like all products here: `scaled_dot_product_attention` is a
    call that nothing fuses with, and wants keys and a mask for every group of heads, which share
    them. What is materialized would be computed again for every channel or position.
    """
    keys_BHSC = slots.keys_SBHC.permute(1, 2, 0, 3)
    values_BHSC = slots.values_SBHC.permute(1, 2, 0, 3)
    products_KBHS = materialize((q_KBHC[..., None, :] * keys_BHSC).sum(-1))
    scores_KBHS = products_KBHS * q_KBHC.shape[-1] ** -0.5
    scores_KBHS = scores_KBHS.masked_fill(~slots.seen_SB.T[:, None], -torch.inf)
    max_KBH1 = materialize(scores_KBHS.amax(-1, keepdim=True))
    weights_KBHS = materialize((scores_KBHS - max_KBH1).exp())
    total_KBH = materialize(weights_KBHS.sum(-1))
    return (weights_KBHS[..., None] * values_BHSC).sum(-2) / total_KBH[..., None]


def _packed(weight: nn.Module) -> RowMajorWeights | TiledWeights:
    assert isinstance(weight, RowMajorWeights | TiledWeights)
    return weight

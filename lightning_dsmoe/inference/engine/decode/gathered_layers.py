"""Layers on one new token of each of a few sequences, reading only the chosen experts' weights.

Shapes: T tokens, D width, K chosen experts, R rows, F hidden units, H KV heads, S tokens in the
cache, C head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.attention.rotary import Rotation, rotate
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.inference.engine.decode.expert_choice import ChosenExperts
from lightning_dsmoe.inference.engine.weights.matvec import materialize, with_matvec_linears
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights
from lightning_dsmoe.inference.engine.weights.tiled import TiledWeights


class LayerSlots(NamedTuple):
    """The keys and values of one layer, and where those of the new tokens go.

    Shape:
        keys_STHC: keys.
        values_STHC: values.
        seen_ST: bool, the slots that hold a token and not padding, the new ones among them.
        at_1: int64, the slot of the new tokens.
    """

    keys_STHC: Tensor
    values_STHC: Tensor
    seen_ST: Tensor
    at_1: Tensor


def gather_experts(experts: Experts, x_TD: Tensor, choice: ChosenExperts) -> Tensor:
    """Sum of the chosen experts' outputs under their gates: `[T, D]`."""
    projected_KTR = _packed(experts.w_in).project(x_TD, choice.experts_K)
    if experts.b_in is not None:
        projected_KTR = projected_KTR + _of(experts.b_in, choice.experts_K)[:, None]
    hidden_KTF = experts.hidden(materialize(projected_KTR)) * choice.gates_KT[..., None]
    y_TD = _packed(experts.w_out).project_and_sum(hidden_KTF, choice.experts_K)
    return y_TD if experts.b_out is None else y_TD + experts.b_out


def gather_heads(
    heads: HeadGroups, x_TD: Tensor, choice: ChosenExperts, by: Rotation | None, slots: LayerSlots
) -> Tensor:
    """Attention with the chosen groups of heads: `[T, D]`.

    Args:
        heads: the layer's heads.
        x_TD: new tokens.
        choice: the groups that run.
        by: rotation of queries and keys, `[T, 1, C]`; None for none.
        slots: what the tokens attend to, to which their own keys and values are written.
    """
    kv_T2HC = with_matvec_linears(heads.kv, x_TD).unflatten(-1, (2, heads.n_heads, heads.d_head))
    keys_THC = heads.k_norm(kv_T2HC[:, 0])
    q_KTR = _packed(heads.w_q).project(x_TD, choice.experts_K)
    if heads.b_q is not None:
        q_KTR = q_KTR + _of(heads.b_q, choice.experts_K)[:, None]
    q_KTHC = heads.q_norm(q_KTR.unflatten(-1, (heads.n_heads, heads.d_head)))
    if by is not None:
        keys_THC, q_KTHC = rotate(keys_THC, by), rotate(q_KTHC, by)
    slots.keys_STHC.index_copy_(0, slots.at_1, keys_THC[None].to(slots.keys_STHC.dtype))
    slots.values_STHC.index_copy_(0, slots.at_1, kv_T2HC[None, :, 1].to(slots.values_STHC.dtype))
    heads_KTHC = _attend(materialize(q_KTHC), slots)
    gated_KTR = (heads_KTHC * choice.gates_KT[..., None, None]).flatten(-2)
    y_TD = _packed(heads.w_o).project_and_sum(gated_KTR, choice.experts_K)
    return y_TD if heads.b_o is None else y_TD + heads.b_o


def _attend(q_KTHC: Tensor, slots: LayerSlots) -> Tensor:
    """Softmax attention to all tokens seen."""
    keys_THSC = slots.keys_STHC.permute(1, 2, 0, 3)
    values_THSC = slots.values_STHC.permute(1, 2, 0, 3)
    products_KTHS = materialize((q_KTHC[..., None, :] * keys_THSC).sum(-1))
    scores_KTHS = products_KTHS * q_KTHC.shape[-1] ** -0.5
    scores_KTHS = scores_KTHS.masked_fill(~slots.seen_ST.T[:, None], -torch.inf)
    weights_KTHS = materialize(
        (scores_KTHS - materialize(scores_KTHS.amax(-1, keepdim=True))).exp()
    )
    total_KTH = materialize(weights_KTHS.sum(-1))
    return (weights_KTHS[..., None] * values_THSC).sum(-2) / total_KTH[..., None]


def _packed(weight: nn.Module) -> RowMajorWeights | TiledWeights:
    assert isinstance(weight, RowMajorWeights | TiledWeights)
    return weight


def _of(weight_EX: Tensor, experts_K: Tensor | None) -> Tensor:
    return weight_EX if experts_K is None else weight_EX[experts_K]

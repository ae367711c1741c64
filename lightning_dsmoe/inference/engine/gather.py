"""Layers on a few tokens that read only the chosen experts' weights.

Shapes: T tokens (one of each sequence), D width, K chosen experts, R rows, H KV heads, S tokens in
the cache, C head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.attention.rotary import Rotation, rotate
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.inference.engine.choice import Choice
from lightning_dsmoe.inference.engine.spelling import kept, spelled_out


class Past(NamedTuple):
    """Keys and values of earlier tokens.

    Shape:
        keys_STHC: keys.
        values_STHC: values.
        seen_ST: bool, the entries that hold a token and not padding.
    """

    keys_STHC: Tensor
    values_STHC: Tensor
    seen_ST: Tensor


class Attended(NamedTuple):
    """The result of attention, and the keys and values of the new tokens.

    Shape:
        y_TD: sum of the groups' outputs.
        keys_THC: keys.
        values_THC: values.
    """

    y_TD: Tensor
    keys_THC: Tensor
    values_THC: Tensor


def gather_experts(experts: Experts, x_TD: Tensor, choice: Choice) -> Tensor:
    """Sum of the chosen experts' outputs under their gates: `[T, D]`."""
    projected_TKR = experts.w_in.products(x_TD, choice.experts_K)
    if experts.b_in is not None:
        projected_TKR = kept(projected_TKR + _of(experts.b_in, choice.experts_K))
    hidden_TKF = kept(experts.hidden(projected_TKR) * choice.gates_TK[..., None])
    y_TD: Tensor = experts.w_out.summed_products(hidden_TKF, choice.experts_K)
    return y_TD if experts.b_out is None else y_TD + experts.b_out


def gather_heads(
    heads: HeadGroups, x_TD: Tensor, choice: Choice, by: Rotation | None, past: Past
) -> Attended:
    """Attention of one new token of each sequence with the chosen groups of heads.

    Args:
        heads: the layer's heads.
        x_TD: new tokens.
        choice: the groups that run.
        by: rotation of queries and keys, `[T, 1, C]`; None for none.
        past: what the tokens attend to besides themselves.
    """
    kv_T2HC = spelled_out(heads.kv, x_TD).unflatten(-1, (2, heads.n_heads, heads.d_head))
    keys_THC = heads.k_norm(kv_T2HC[:, 0])
    values_THC = kv_T2HC[:, 1]
    q_TKR = heads.w_q.products(x_TD, choice.experts_K)
    if heads.b_q is not None:
        q_TKR = q_TKR + _of(heads.b_q, choice.experts_K)
    q_TKHC = heads.q_norm(q_TKR.unflatten(-1, (heads.n_heads, heads.d_head)))
    if by is not None:
        keys_THC = rotate(keys_THC, by)
        q_TKHC = rotate(q_TKHC, Rotation(by.cos[:, None], by.sin[:, None]))
    keys_THC, q_TKHC = kept(keys_THC), kept(q_TKHC)
    heads_TKHC = _attend(q_TKHC, keys_THC, values_THC, past)
    gated_TKR = kept((heads_TKHC * choice.gates_TK[..., None, None]).flatten(-2))
    y_TD = heads.w_o.summed_products(gated_TKR, choice.experts_K)
    return Attended(y_TD if heads.b_o is None else y_TD + heads.b_o, keys_THC, values_THC)


def _attend(q_TKHC: Tensor, keys_THC: Tensor, values_THC: Tensor, past: Past) -> Tensor:
    """Softmax attention to earlier tokens and to the new token itself."""
    scale = q_TKHC.shape[-1] ** -0.5
    keys_THSC = past.keys_STHC.permute(1, 2, 0, 3)
    values_THSC = past.values_STHC.permute(1, 2, 0, 3)
    own_TKH = kept((q_TKHC * keys_THC[:, None]).sum(-1)) * scale
    scores_TKHS = kept((q_TKHC[..., None, :] * keys_THSC[:, None]).sum(-1)) * scale
    scores_TKHS = scores_TKHS.masked_fill(~past.seen_ST.T[:, None, None], -torch.inf)
    most_TKH = kept(torch.maximum(scores_TKHS.amax(-1), own_TKH))
    weights_TKHS = kept((scores_TKHS - most_TKH[..., None]).exp())
    own_TKH = kept((own_TKH - most_TKH).exp())
    total_TKH = weights_TKHS.sum(-1) + own_TKH
    summed_TKHC = (weights_TKHS[..., None] * values_THSC[:, None]).sum(-2)
    own_TKHC = own_TKH[..., None] * values_THC[:, None]
    return (summed_TKHC + own_TKHC) / kept(total_TKH)[..., None]


def _of(weight_EX: Tensor, experts_K: Tensor | None) -> Tensor:
    return weight_EX if experts_K is None else weight_EX[experts_K]

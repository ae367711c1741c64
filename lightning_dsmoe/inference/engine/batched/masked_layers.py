"""Layers on many tokens that read all weights: for plans of all experts, and as the masked path.

Experts that a selection drops have gate zero.

Shapes: X tokens, E experts, R rows of one expert, F hidden units, D width; B batch, T new tokens,
H KV heads, S tokens so far, C head width; I and O inputs and outputs of a matrix, N parts of it.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights, as_row_major

_FEW_TOKENS = 256
_MANY_WEIGHTS = 2**19
_TOGETHER = 4
"""Products taken together for few tokens on a CPU: one of few rows leaves cores and memory idle."""


def add_wide_experts(
    into_XD: Tensor, experts: Experts, x_XD: Tensor, gates_XE: Tensor | None
) -> None:
    """Add all experts' outputs under their gates, None for gates of 1, in place."""
    rows_ERD = as_row_major(experts.w_in).rows(slice(None))
    b_in = None if experts.b_in is None else experts.b_in.flatten()
    projected_XR = _linear(x_XD, rows_ERD.flatten(0, 1), b_in)
    hidden_XEF = experts.hidden(projected_XR.unflatten(1, (experts.n_experts, -1)))
    _add_wide_sum(into_XD, as_row_major(experts.w_out), hidden_XEF, gates_XE, experts.b_out)


def add_wide_heads(
    into_XD: Tensor,
    heads: HeadGroups,
    x_BTD: Tensor,
    scope: Scope,
    keys_BHSC: Tensor,
    values_BHSC: Tensor,
    gates_XE: Tensor | None,
) -> None:
    """Add the attention of all groups of heads under their gates, in place."""
    b_q = None if heads.b_q is None else heads.b_q.flatten()
    q_XR = _linear(
        x_BTD.flatten(0, 1), as_row_major(heads.w_q).rows(slice(None)).flatten(0, 1), b_q
    )
    q_BTR = q_XR.unflatten(0, x_BTD.shape[:2])
    q_BTEHC = rearrange(q_BTR, "b t (e h c) -> b t e h c", e=heads.n_groups, h=heads.n_heads)
    heads_BTER = attend_groups(heads, q_BTEHC, scope, keys_BHSC, values_BHSC)
    _add_wide_sum(into_XD, as_row_major(heads.w_o), heads_BTER.flatten(0, 1), gates_XE, heads.b_o)


def attend_groups(
    heads: HeadGroups, q_BTEHC: Tensor, scope: Scope, keys_BHSC: Tensor, values_BHSC: Tensor
) -> Tensor:
    """Attention of several groups of queries per token over shared keys and values.

    Returns:
        `[B, T, E, H C]`.
    """
    n_groups = q_BTEHC.shape[2]
    q_BTEHC = heads.place(heads.q_norm(q_BTEHC), scope.positions_BT[:, :, None, None])
    attend = scope.attend_BTS
    if attend is not None and q_BTEHC.shape[1] == 1:
        # Groups of one token see the same keys, so that they can be rows of one product.
        q_BHEC = rearrange(q_BTEHC, "b 1 e h c -> b h e c")
        heads_BHEC = F.scaled_dot_product_attention(
            q_BHEC, keys_BHSC, values_BHSC, attn_mask=attend[:, None]
        )
        return rearrange(heads_BHEC, "b h e c -> b 1 e (h c)")
    heads_BGTC = F.scaled_dot_product_attention(
        rearrange(q_BTEHC, "b t e h c -> b (h e) t c"),
        keys_BHSC,
        values_BHSC,
        attn_mask=None if attend is None else attend[:, None],
        is_causal=attend is None,
        enable_gqa=n_groups > 1,
    )
    return rearrange(heads_BGTC, "b (h e) t c -> b t e (h c)", e=n_groups)


def _few(tokens_X: Tensor) -> bool:
    return tokens_X.device.type == "cpu" and len(tokens_X) <= _FEW_TOKENS


def _linear(x_XI: Tensor, rows_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    if not _few(x_XI) or rows_OI.numel() < _MANY_WEIGHTS or len(rows_OI) % _TOGETHER:
        return F.linear(x_XI, rows_OI, bias_O)
    out_NXO = torch.bmm(x_XI.expand(_TOGETHER, -1, -1), rows_OI.unflatten(0, (_TOGETHER, -1)).mT)
    out_XO = rearrange(out_NXO, "n x o -> x (n o)")
    return out_XO if bias_O is None else out_XO + bias_O


def _add_wide_sum(
    into_XD: Tensor,
    w_out: RowMajorWeights,
    hidden_XEF: Tensor,
    gates_XE: Tensor | None,
    bias: Tensor | None,
) -> None:
    if gates_XE is not None:
        hidden_XEF = hidden_XEF * gates_XE[..., None].to(hidden_XEF.dtype)
    n_experts = hidden_XEF.shape[1]
    if not _few(hidden_XEF):
        matrices = w_out.of(range(n_experts))
        for hidden_XF, matrix_FD in zip(hidden_XEF.unbind(1), matrices, strict=True):
            into_XD.addmm_(hidden_XF, matrix_FD)
    elif n_experts == 1:
        into_XD += _linear(hidden_XEF[:, 0], w_out.rows(0), None)
    else:
        into_XD += _sum_of_products(hidden_XEF.transpose(0, 1), w_out())
    if bias is not None:
        into_XD += bias


def _sum_of_products(hidden_EXF: Tensor, matrices_EFD: Tensor) -> Tensor:
    """The sum over experts of each one's hidden units times its matrix."""
    first, *others = zip(hidden_EXF.split(_TOGETHER), matrices_EFD.split(_TOGETHER), strict=True)
    sums_NXD = torch.bmm(*first)
    for factors in others:
        sums_NXD[: len(factors[0])].baddbmm_(*factors)
    return sums_NXD.sum(0)

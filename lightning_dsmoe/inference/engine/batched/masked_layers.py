"""Layers that run all experts on all tokens; those that a selection drops have gates of zero.

They read all weights, in a few large matrix products: the fastest way for plans of all experts,
for layers without a router, and where experts or batches are too small to sort tokens by expert.

Shapes: N tokens, E experts, R rows of one expert, F expert width, D model width; B sequences,
T new positions, S positions so far, H KV heads, C head width; P products in one `torch.bmm`,
I and O the inputs and outputs of a matrix, o = O / P.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.inference.engine.batched.wide_weights import wide
from lightning_dsmoe.inference.engine.weights.row_major import (
    Int8RowMajorWeights,
    RowMajorWeights,
    as_row_major,
)

# A matrix product of few tokens leaves cores and memory channels of a CPU idle. Four in one
# `torch.bmm` are 1.4 to 2 times as fast with 2 threads and up to 64 tokens; smaller matrices in
# four parts are up to 1.3 times slower. See docs/lab_notes/batched.md.
_PRODUCTS_AT_ONCE = 4
_PRODUCTS_MAX_TOKENS = 256
_PRODUCTS_MIN_WEIGHTS = 2**19


def add_masked_experts(
    residual_ND: Tensor, experts: Experts, x_ND: Tensor, gates_NE: Tensor | None
) -> None:
    """Add all experts' outputs under their gates to the residual stream, in place.

    Args:
        residual_ND: the residual stream.
        experts: the experts, packed.
        x_ND: normalized tokens.
        gates_NE: gate of each expert, zero for those not chosen; None for gates of 1.
    """
    b_in = None if experts.b_in is None else experts.b_in.flatten()
    projected_NR = _project(x_ND, as_row_major(experts.w_in), b_in)
    hidden_NEF = experts.hidden(projected_NR.unflatten(1, (experts.n_experts, -1)))
    _add_gated_products(
        residual_ND, as_row_major(experts.w_out), hidden_NEF, gates_NE, experts.b_out
    )


def add_masked_heads(
    residual_ND: Tensor,
    heads: HeadGroups,
    x_BTD: Tensor,
    scope: Scope,
    keys_BHSC: Tensor,
    values_BHSC: Tensor,
    gates_NE: Tensor | None,
) -> None:
    """Add the attention of all groups of heads under their gates to the residual stream, in place.

    Args:
        residual_ND: the residual stream.
        heads: the groups of query heads, packed.
        x_BTD: normalized tokens.
        scope: which positions attend to which.
        keys_BHSC: keys of all positions so far.
        values_BHSC: their values.
        gates_NE: gate of each group, zero for those not chosen; None for gates of 1.
    """
    b_q = None if heads.b_q is None else heads.b_q.flatten()
    q_NR = _project(x_BTD.flatten(0, 1), as_row_major(heads.w_q), b_q)
    q_BTR = q_NR.unflatten(0, x_BTD.shape[:2])
    q_BTEHC = rearrange(q_BTR, "b t (e h c) -> b t e h c", e=heads.n_groups, h=heads.n_heads)
    heads_BTER = attend_groups(heads, q_BTEHC, scope, keys_BHSC, values_BHSC)
    heads_NER = heads_BTER.flatten(0, 1)
    _add_gated_products(residual_ND, as_row_major(heads.w_o), heads_NER, gates_NE, heads.b_o)


def attend_groups(
    heads: HeadGroups, q_BTEHC: Tensor, scope: Scope, keys_BHSC: Tensor, values_BHSC: Tensor
) -> Tensor:
    """Attention of groups of query heads over shared keys and values, before any gate.

    Args:
        heads: the layer's heads, for norms and rotary positions.
        q_BTEHC: queries of all groups, or of those that each token runs.
        scope: which positions attend to which.
        keys_BHSC: keys of all positions so far.
        values_BHSC: their values.

    Returns:
        `[B, T, E, H C]`.
    """
    n_groups = q_BTEHC.shape[2]
    q_BTEHC = heads.place(heads.q_norm(q_BTEHC), scope.positions_BT[:, :, None, None])
    attend = scope.attend_BTS
    if attend is not None and q_BTEHC.shape[1] == 1:
        # The groups of a single token attend to the same keys, so they can be the rows of one
        # product per KV head rather than heads with one row each.
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
        is_causal=scope.causal and attend is None,
        enable_gqa=n_groups > 1,
    )
    return rearrange(heads_BGTC, "b (h e) t c -> b t e (h c)", e=n_groups)


def _project(x_NI: Tensor, weights: RowMajorWeights, bias_R: Tensor | None) -> Tensor:
    """Products of the rows of all experts with all tokens, `[N, E R]` with R rows of one."""
    if not _two_by_two(weights, x_NI):
        return _linear(x_NI, weights.rows(slice(None)).flatten(0, 1), bias_R)
    products = [
        weights.products(x_NI.expand(len(pair), -1, -1), pair)
        for pair in _pairs(len(weights.weight))
    ]
    out_NR = rearrange(torch.cat(products), "e n r -> n (e r)")
    return out_NR if bias_R is None else out_NR + bias_R


def _two_by_two(weights: RowMajorWeights, x: Tensor) -> bool:
    """Whether experts run two by two: in 8 bits on a CPU, whose caches then hold their floats.

    Those of all experts would be written to memory and read again, which took 9 ms for 32 experts
    of 128 x 768 where converting takes 3 (docs/lab_notes/int8.md).
    """
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and isinstance(weights, Int8RowMajorWeights)


def _pairs(n_experts: int) -> list[range]:
    return [range(e, min(e + 2, n_experts)) for e in range(0, n_experts, 2)]


def _in_several_products(x: Tensor) -> bool:
    return x.device.type == "cpu" and len(x) <= _PRODUCTS_MAX_TOKENS


def _in_one_product(x: Tensor) -> bool:
    return x.device.type != "cpu"


def _linear(x_NI: Tensor, rows_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """A linear layer, its outputs in several products where that is faster."""
    large = rows_OI.numel() >= _PRODUCTS_MIN_WEIGHTS and len(rows_OI) % _PRODUCTS_AT_ONCE == 0
    if not (large and _in_several_products(x_NI)):
        return F.linear(x_NI, rows_OI, bias_O)
    rows_PoI = rows_OI.unflatten(0, (_PRODUCTS_AT_ONCE, -1))
    out_PNo = torch.bmm(x_NI.expand(_PRODUCTS_AT_ONCE, -1, -1), rows_PoI.mT)
    out_NO = rearrange(out_PNo, "p n o -> n (p o)")
    return out_NO if bias_O is None else out_NO + bias_O


def _add_gated_products(
    residual_ND: Tensor,
    w_out: RowMajorWeights,
    hidden_NEF: Tensor,
    gates_NE: Tensor | None,
    bias_D: Tensor | None,
) -> None:
    """Add the hidden units of all experts under their gates, times their output weights."""
    if gates_NE is not None:
        hidden_NEF = hidden_NEF * gates_NE[..., None].to(hidden_NEF.dtype)
    n_experts = hidden_NEF.shape[1]
    two_by_two = _two_by_two(w_out, hidden_NEF)
    if _in_one_product(hidden_NEF) and (wide_DR := wide(w_out)) is not None:
        # As a layer without experts does. It rounds differently once unused experts are removed.
        residual_ND += F.linear(hidden_NEF.flatten(1), wide_DR)
    elif two_by_two and len(hidden_NEF) < hidden_NEF.shape[2]:
        hidden_ENF = hidden_NEF.transpose(0, 1)
        for pair in _pairs(n_experts):
            for out_ND in w_out.products(hidden_ENF[pair.start : pair.stop], pair):
                residual_ND += out_ND
    elif two_by_two or not _in_several_products(hidden_NEF):
        # One expert after another. One product over all E F hidden units is 1.2 to 1.5 times as
        # fast for small experts, but rounds differently once unused experts are removed, where
        # adding their zeros here changes no bit of the logits. See docs/lab_notes/batched.md.
        for expert, hidden_NF in enumerate(hidden_NEF.unbind(1)):
            residual_ND.addmm_(hidden_NF, *w_out.of([expert]))
    elif n_experts == 1:
        residual_ND += _linear(hidden_NEF[:, 0], w_out.rows(0), None)
    else:
        residual_ND += _sum_of_products(hidden_NEF.transpose(0, 1), w_out())
    if bias_D is not None:
        residual_ND += bias_D


def _sum_of_products(hidden_ENF: Tensor, matrices_EFD: Tensor) -> Tensor:
    """The sum over experts of hidden units times output weights, several experts in one product."""
    first, *others = zip(
        hidden_ENF.split(_PRODUCTS_AT_ONCE), matrices_EFD.split(_PRODUCTS_AT_ONCE), strict=True
    )
    sums_PND = torch.bmm(*first)
    for factors in others:
        sums_PND[: len(factors[0])].baddbmm_(*factors)
    return sums_PND.sum(0)

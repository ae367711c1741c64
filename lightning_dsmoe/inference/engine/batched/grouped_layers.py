"""Layers that run each expert on its own tokens only.

Tokens are sorted by expert, and experts run two by two: one `torch.bmm` of two matrices keeps more
cores busy than two products do (161 to 187 GFLOP/s rather than 126 to 183, see
docs/lab_notes/batched.md), and the weights of any two experts are evenly spaced in memory, so they
are read where they are, as one strided view. The two that run together have about as many tokens:
experts are ordered by their number of tokens, and the second is padded to the first.

Shapes: N tokens, E experts, D model width, R rows of one expert, F expert width; P (token, expert)
pairs in the order in which they run, padding included; G experts that run together (one or two),
M rows of each, padding included; B sequences, T new positions, S positions so far, H KV heads,
C head width, K active groups of query heads, at most, of one token, Q = N·K.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.inference.engine.batched.masked_layers import attend_groups
from lightning_dsmoe.inference.engine.weights.row_major import as_row_major

# Costs in multiply-accumulates, fitted to times on two cores of an AMD EPYC in float32. Over ten
# sizes of layers and 4 to 8,192 tokens the estimate is 1.0 % slower than the better method on
# average, see docs/lab_notes/batched.md. 8 bits are taken to cost the same.
_MACS_PER_WEIGHT = 20  # for reading it
_MACS_PER_CHANNEL = 50  # for gathering a token for an expert, and adding its output
_MACS_PER_EXPERT = 8_000_000  # for starting its kernels


class Group(NamedTuple):
    """One or two experts that run together.

    Shape:
        experts: their numbers, ascending.
        counts: tokens of each, at most M.
        pairs: where their G·M pairs stand among all.
    """

    experts: list[int]
    counts: list[int]
    pairs: slice


class Pairs(NamedTuple):
    """Which token runs which expert under which gate, in the order in which they run.

    Shape:
        token_P: token of each pair.
        gate_P: its gate.
        slot_P: which of the experts of its token it is, from 0 to n_slots - 1.
        n_slots: active experts, at most, of one token.
        groups: the experts with at least one token.
    """

    token_P: Tensor
    gate_P: Tensor
    slot_P: Tensor
    n_slots: int
    groups: list[Group]


def grouping_pays(
    counts: Sequence[int], n_tokens: int, n_experts: int, macs: int, d_model: int
) -> bool:
    """Whether each expert on its own tokens is estimated to be faster than all experts on all.

    The estimate is one for CPUs. Where tokens run different numbers of attention experts, grouped
    attention takes a little longer than estimated.

    Args:
        counts: tokens of each expert.
        n_tokens: tokens N.
        n_experts: experts E, removed ones included, so that a model takes the same method without
            them.
        macs: multiply-accumulates of one expert for one token, about the number of its weights.
        d_model: width D.
    """
    masked = n_experts * macs * (n_tokens + _MACS_PER_WEIGHT)
    n_running = sum(count > 0 for count in counts)
    grouped = n_running * (macs * _MACS_PER_WEIGHT + _MACS_PER_EXPERT)
    return grouped + sum(counts) * (macs + d_model * _MACS_PER_CHANNEL) < masked


def sort_by_expert(gates_NE: Tensor, active_NE: Tensor, counts: Sequence[int]) -> Pairs:
    """Sort (token, expert) pairs by expert, in groups of one or two experts.

    Args:
        gates_NE: gate of each expert.
        active_NE: the experts that run, bool.
        counts: tokens of each expert.
    """
    busiest_first = sorted((e for e, n in enumerate(counts) if n), key=lambda e: -counts[e])
    together = [sorted(busiest_first[i : i + 2]) for i in range(0, len(busiest_first), 2)]
    # Every expert of a group gets M rows in a row, whatever its own count, so that one view
    # [G, M, D] holds the group's tokens.
    order = [e for experts in together for e in experts]
    n_rows = [max(counts[e] for e in experts) for experts in together for _ in experts]
    begins = [0, *accumulate(n_rows)]

    # `nonzero` lists all pairs by expert, those of expert e from `starts[e]` on. One gather brings
    # them into the order of the groups, where a loop over experts would start kernels for each.
    # Padding holds whichever pairs come next in the list; nobody reads what they compute.
    expert_P, token_P = active_NE.T.nonzero(as_tuple=True)
    starts = [0, *accumulate(counts)]
    shifts = [starts[e] - begin for e, begin in zip(order, begins, strict=False)]
    shift_P = torch.tensor(shifts).repeat_interleave(torch.tensor(n_rows))
    source_P = torch.arange(begins[-1]).add_(shift_P).clamp_(max=len(token_P) - 1)
    source_P = source_P.to(token_P.device)
    token_P, expert_P = token_P[source_P], expert_P[source_P]
    slots_NE = active_NE.cumsum(1) - 1
    return Pairs(
        token_P,
        gates_NE[token_P, expert_P],
        slots_NE[token_P, expert_P],
        int(slots_NE[:, -1].max()) + 1,
        [
            Group(experts, [counts[e] for e in experts], slice(begins[i], begins[i + len(experts)]))
            for i, experts in zip(range(0, len(order), 2), together, strict=True)
        ],
    )


def add_grouped_experts(residual_ND: Tensor, experts: Experts, x_ND: Tensor, pairs: Pairs) -> None:
    """Add the outputs of each token's experts under their gates to the residual stream, in place.

    Args:
        residual_ND: the residual stream.
        experts: the experts, packed.
        x_ND: normalized tokens.
        pairs: which token runs which expert under which gate.
    """
    for group, x_GMD, gate_GM1 in _grouped_tokens(pairs, x_ND):
        projected_GMR = as_row_major(experts.w_in).products(x_GMD, group.experts)
        if experts.b_in is not None:
            projected_GMR += experts.b_in[group.experts][:, None]
        hidden_GMF = experts.hidden(projected_GMR)
        hidden_GMF *= gate_GM1.to(hidden_GMF.dtype)
        out_GMD = as_row_major(experts.w_out).products(hidden_GMF, group.experts)
        _add_to_tokens(residual_ND, pairs, group, out_GMD)
    if experts.b_out is not None:
        residual_ND += experts.b_out


def add_grouped_heads(
    residual_ND: Tensor,
    heads: HeadGroups,
    x_BTD: Tensor,
    scope: Scope,
    keys_BHSC: Tensor,
    values_BHSC: Tensor,
    pairs: Pairs,
) -> None:
    """Add the attention of each token's groups of heads under their gates, in place.

    Args:
        residual_ND: the residual stream.
        heads: the groups of query heads, packed.
        x_BTD: normalized tokens.
        scope: which positions attend to which.
        keys_BHSC: keys of all positions so far.
        values_BHSC: their values.
        pairs: which token runs which group under which gate.
    """
    batch, length, _ = x_BTD.shape
    x_ND = x_BTD.flatten(0, 1)
    n_rows = heads.n_heads * heads.d_head
    # Queries are computed expert by expert, but attention is one call for all tokens: the active
    # groups of a token take its K slots, whichever they are, since keys and values are shared.
    # Slots that a token does not fill have queries of zero, and nobody reads what they attend to.
    place_P = pairs.token_P * pairs.n_slots + pairs.slot_P
    q_QR = x_ND.new_zeros(len(x_ND) * pairs.n_slots, n_rows)
    for group, x_GMD, _ in _grouped_tokens(pairs, x_ND):
        q_GMR = as_row_major(heads.w_q).products(x_GMD, group.experts)
        if heads.b_q is not None:
            q_GMR += heads.b_q[group.experts][:, None]
        place_GM = place_P[group.pairs].view(q_GMR.shape[:2])
        for place_M, q_MR, count in zip(place_GM, q_GMR, group.counts, strict=True):
            q_QR.index_copy_(0, place_M[:count], q_MR[:count])
    q_BTKHC = q_QR.view(batch, length, -1, heads.n_heads, heads.d_head)
    heads_BTKR = attend_groups(heads, q_BTKHC, scope, keys_BHSC, values_BHSC)
    heads_QR = rearrange(heads_BTKR, "b t k r -> (b t k) r")
    for group in pairs.groups:
        heads_MR = heads_QR.index_select(0, place_P[group.pairs])
        heads_MR *= pairs.gate_P[group.pairs, None].to(heads_MR.dtype)
        heads_GMR = heads_MR.view(len(group.experts), -1, n_rows)
        out_GMD = as_row_major(heads.w_o).products(heads_GMR, group.experts)
        _add_to_tokens(residual_ND, pairs, group, out_GMD)
    if heads.b_o is not None:
        residual_ND += heads.b_o


def _grouped_tokens(pairs: Pairs, x_ND: Tensor) -> Iterator[tuple[Group, Tensor, Tensor]]:
    """Each group, its tokens `[G, M, D]`, overwritten by the next one's, and gates `[G, M, 1]`."""
    sizes = [group.pairs.stop - group.pairs.start for group in pairs.groups]
    buffer = x_ND.new_empty(max(sizes, default=0), x_ND.shape[1])
    for group, size in zip(pairs.groups, sizes, strict=True):
        shape = len(group.experts), size // len(group.experts), -1
        picked = torch.index_select(x_ND, 0, pairs.token_P[group.pairs], out=buffer[:size])
        yield group, picked.view(shape), pairs.gate_P[group.pairs].view(shape)


def _add_to_tokens(residual_ND: Tensor, pairs: Pairs, group: Group, out_GMD: Tensor) -> None:
    """Add each expert's outputs to its tokens, without those of padding.

    One expert at a time, for a token may run both of a group.
    """
    token_GM = pairs.token_P[group.pairs].view(out_GMD.shape[:2])
    for token_M, out_MD, count in zip(token_GM, out_GMD, group.counts, strict=True):
        residual_ND.index_add_(0, token_M[:count], out_MD[:count].to(residual_ND.dtype))

"""Layers on many tokens that run each expert on just its own tokens.

Experts are taken two by two, those with the most tokens first: a batch of two matrix products keeps
more cores busy than one does, and two experts are always evenly spaced in memory, so that nothing
is copied. Of two experts the one with fewer tokens is given some of its neighbour's at the end,
whose results are dropped.

Shapes: X tokens, E experts, P pairs of a token and an expert, in the order in which they run; G
experts taken together (one or two), M tokens of each, R rows of one expert, F hidden units, D
width; B batch, T new tokens, K most groups of heads of one token, H KV heads, S tokens so far,
C head width.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.inference.engine.batched.masked_layers import attend_groups
from lightning_dsmoe.inference.engine.weights.row_major import as_row_major

# In multiplications, fitted to times on two cores of an AMD EPYC in float32.
_READING = 20
"""For each weight that is read."""
_MOVING = 50
"""For each channel of a token that is brought to an expert and back."""
_STARTING = 8_000_000
"""For each expert that is run by itself."""


class Group(NamedTuple):
    """Experts taken together.

    Shape:
        experts: their numbers, ascending.
        counts: how many tokens each runs on, M at the most.
        pairs: where their G M pairs stand among all.
    """

    experts: list[int]
    counts: list[int]
    pairs: slice


class Pairs(NamedTuple):
    """Which token runs which expert under which gate, one entry a pair.

    Shape:
        token_P: token of each pair.
        gate_P: its gate.
        slot_P: a number that no other pair of its token has.
        n_slots: how many such numbers there are.
        groups: the experts with at least one token.
    """

    token_P: Tensor
    gate_P: Tensor
    slot_P: Tensor
    n_slots: int
    groups: list[Group]


def grouping_pays(
    counts: Sequence[int], n_tokens: int, n_experts: int, work: int, width: int
) -> bool:
    """Whether each expert on its own tokens is faster than all experts on all, by an estimate.

    The estimate is one for CPUs. Where tokens run different numbers of heads, grouped attention
    takes a little longer than it says.

    Args:
        counts: how many tokens each expert runs on.
        n_tokens: how many there are.
        n_experts: how many experts there are, those included that were removed, so that a model
            takes the same way without them.
        work: multiplications of one expert for one token, about the number of its weights.
        width: channels of a token.
    """
    everything = n_experts * work * (n_tokens + _READING)
    running = [count for count in counts if count]
    alone = len(running) * (work * _READING + _STARTING)
    return alone + sum(running) * (work + width * _MOVING) < everything


def pair_up(gates_XE: Tensor, active_XE: Tensor, counts: Sequence[int]) -> Pairs:
    """List the pairs of tokens and experts that run, in groups of one or two experts.

    Args:
        gates_XE: gates.
        active_XE: whether a token runs an expert.
        counts: how many tokens each expert runs on.
    """
    expert_P, token_P = active_XE.T.nonzero(as_tuple=True)
    so_far_XE = active_XE.cumsum(1)
    starts = [0, *accumulate(counts)]
    order = sorted((e for e, count in enumerate(counts) if count), key=lambda e: -counts[e])
    groups: list[Group] = []
    shifts: list[int] = []
    lengths: list[int] = []
    for first in range(0, len(order), 2):
        experts = sorted(order[first : first + 2])
        most = max(counts[e] for e in experts)
        at = sum(lengths)
        for expert in experts:
            shifts.append(starts[expert] - sum(lengths))
            lengths.append(most)
        pairs = slice(at, at + most * len(experts))
        groups.append(Group(experts, [counts[e] for e in experts], pairs))
    shift_P = torch.tensor(shifts).repeat_interleave(torch.tensor(lengths))
    at_P = torch.arange(len(shift_P)).add_(shift_P).clamp_(max=len(token_P) - 1)
    at_P = at_P.to(token_P.device)
    token_P, expert_P = token_P[at_P], expert_P[at_P]
    return Pairs(
        token_P,
        gates_XE[token_P, expert_P],
        so_far_XE[token_P, expert_P] - 1,
        int(so_far_XE[:, -1].max()),
        groups,
    )


def add_grouped_experts(into_XD: Tensor, experts: Experts, x_XD: Tensor, pairs: Pairs) -> None:
    """Add the outputs of each token's experts under their gates, in place."""
    for group, x_GMD, gate_GM1 in _tokens_of_each(pairs, x_XD):
        projected_GMR = torch.bmm(x_GMD, as_row_major(experts.w_in).group(group.experts).mT)
        if experts.b_in is not None:
            projected_GMR += experts.b_in[group.experts][:, None]
        hidden_GMF = experts.hidden(projected_GMR)
        hidden_GMF *= gate_GM1.to(hidden_GMF.dtype)
        out_GMD = torch.bmm(hidden_GMF, as_row_major(experts.w_out).group(group.experts).mT)
        _add(into_XD, pairs, group, out_GMD)
    if experts.b_out is not None:
        into_XD += experts.b_out


def add_grouped_heads(
    into_XD: Tensor,
    heads: HeadGroups,
    x_BTD: Tensor,
    scope: Scope,
    keys_BHSC: Tensor,
    values_BHSC: Tensor,
    pairs: Pairs,
) -> None:
    """Add the attention of each token's groups of heads under their gates, in place."""
    batch, length, _ = x_BTD.shape
    x_XD = x_BTD.flatten(0, 1)
    n_rows = heads.n_heads * heads.d_head
    place_P = pairs.token_P * pairs.n_slots + pairs.slot_P
    q_ZR = x_XD.new_zeros(len(x_XD) * pairs.n_slots, n_rows)
    for group, x_GMD, _ in _tokens_of_each(pairs, x_XD):
        q_GMR = torch.bmm(x_GMD, as_row_major(heads.w_q).group(group.experts).mT)
        if heads.b_q is not None:
            q_GMR += heads.b_q[group.experts][:, None]
        place_GM = place_P[group.pairs].view(q_GMR.shape[:2])
        for place_M, q_MR, count in zip(place_GM, q_GMR, group.counts, strict=True):
            q_ZR.index_copy_(0, place_M[:count], q_MR[:count])
    q_BTKHC = q_ZR.view(batch, length, -1, heads.n_heads, heads.d_head)
    heads_ZR = attend_groups(heads, q_BTKHC, scope, keys_BHSC, values_BHSC).flatten(0, 2)
    for group in pairs.groups:
        heads_MR = heads_ZR.index_select(0, place_P[group.pairs])
        heads_MR *= pairs.gate_P[group.pairs, None].to(heads_MR.dtype)
        heads_GMR = heads_MR.view(len(group.experts), -1, n_rows)
        _add(
            into_XD,
            pairs,
            group,
            torch.bmm(heads_GMR, as_row_major(heads.w_o).group(group.experts).mT),
        )
    if heads.b_o is not None:
        into_XD += heads.b_o


def _tokens_of_each(pairs: Pairs, x_XD: Tensor) -> Iterator[tuple[Group, Tensor, Tensor]]:
    """Each group, its tokens `[G, M, D]`, overwritten by the next one's, and gates `[G, M, 1]`."""
    sizes = [group.pairs.stop - group.pairs.start for group in pairs.groups]
    room = x_XD.new_empty(max(sizes, default=0), x_XD.shape[1])
    for group, size in zip(pairs.groups, sizes, strict=True):
        shape = len(group.experts), size // len(group.experts), -1
        picked = torch.index_select(x_XD, 0, pairs.token_P[group.pairs], out=room[:size])
        yield group, picked.view(shape), pairs.gate_P[group.pairs].view(shape)


def _add(into_XD: Tensor, pairs: Pairs, group: Group, out_GMD: Tensor) -> None:
    """Add outputs at their tokens."""
    tokens_GM = pairs.token_P[group.pairs].view(out_GMD.shape[:2])
    for tokens_M, out_MD, count in zip(tokens_GM, out_GMD, group.counts, strict=True):
        into_XD.index_add_(0, tokens_M[:count], out_MD[:count].to(into_XD.dtype))

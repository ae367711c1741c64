"""Layers on many tokens that run each expert on just its own tokens.

Shapes: X tokens, E experts, P pairs of a token and an expert that it runs, R rows of one expert,
F hidden units, D width; B batch, T new tokens, K most groups of one token, H KV heads, S tokens so
far, C head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.inference.engine.rows import Rows
from lightning_dsmoe.inference.engine.wide import attend_groups


class Pairs(NamedTuple):
    """Which token runs which expert, one entry a pair, sorted by expert.

    Shape:
        running: the experts with at least one token.
        counts: number of tokens of each of them.
        token_P: token of each pair.
        gate_P: its gate.
        by_token_P: the pairs in the order of their tokens.
        first_X: where each token's pairs begin in that order.
    """

    running: list[int]
    counts: list[int]
    token_P: Tensor
    gate_P: Tensor
    by_token_P: Tensor
    first_X: Tensor


def pair_up(gates_XE: Tensor, active_XE: Tensor) -> Pairs:
    """List the pairs of tokens and experts that run."""
    expert_P, token_P = active_XE.T.nonzero(as_tuple=True)
    counts_E = active_XE.sum(0).tolist()
    running = [e for e, count in enumerate(counts_E) if count]
    counts_X = active_XE.sum(1)
    return Pairs(
        running,
        [counts_E[e] for e in running],
        token_P,
        gates_XE[token_P, expert_P],
        token_P.argsort(stable=True),
        counts_X.cumsum(0) - counts_X,
    )


def grouped_experts(experts: Experts, x_XD: Tensor, pairs: Pairs) -> Tensor:
    """Sum of each token's experts under their gates: `[X, D]`."""
    projected_PR = _products(x_XD[pairs.token_P], experts.w_in, pairs, experts.b_in)
    y_XD = _summed_products(experts.hidden(projected_PR), experts.w_out, pairs)
    return y_XD if experts.b_out is None else y_XD + experts.b_out


def grouped_heads(
    heads: HeadGroups,
    x_BTD: Tensor,
    scope: Scope,
    keys_BHSC: Tensor,
    values_BHSC: Tensor,
    pairs: Pairs,
) -> Tensor:
    """Attention with each token's groups of heads under their gates: `[X, D]`."""
    batch, length, _ = x_BTD.shape
    q_PR = _products(x_BTD.flatten(0, 1)[pairs.token_P], heads.w_q, pairs, heads.b_q)
    slot_P = torch.empty_like(pairs.token_P)
    steps_P = torch.arange(len(slot_P), device=slot_P.device)
    slot_P[pairs.by_token_P] = steps_P - pairs.first_X[pairs.token_P[pairs.by_token_P]]
    q_XKR = q_PR.new_zeros(batch * length, int(slot_P.max()) + 1, q_PR.shape[1])
    q_XKR[pairs.token_P, slot_P] = q_PR
    q_BTKHC = q_XKR.view(batch, length, -1, heads.n_heads, heads.d_head)
    heads_BTKR = attend_groups(heads, q_BTKHC, scope, keys_BHSC, values_BHSC)
    heads_PR = heads_BTKR.flatten(0, 1)[pairs.token_P, slot_P]
    y_XD = _summed_products(heads_PR, heads.w_o, pairs)
    return y_XD if heads.b_o is None else y_XD + heads.b_o


def _products(x_PD: Tensor, w_in: Rows, pairs: Pairs, b_ER: Tensor | None) -> Tensor:
    """Each pair's token times its expert's rows: `[P, R]`."""
    y_PR = x_PD.new_empty(len(x_PD), w_in.weight.shape[1])
    for x_MD, y_MR, e in zip(x_PD.split(pairs.counts), y_PR.split(pairs.counts), pairs.running):
        torch.mm(x_MD, w_in.rows(e).T, out=y_MR)
        if b_ER is not None:
            y_MR += b_ER[e]
    return y_PR


def _summed_products(hidden_PF: Tensor, w_out: Rows, pairs: Pairs) -> Tensor:
    """Each pair's hidden units times its expert's output weights, summed under gates: `[X, D]`."""
    y_PD = hidden_PF.new_empty(len(hidden_PF), w_out.weight.shape[1])
    for hidden_MF, y_MD, e in zip(
        hidden_PF.split(pairs.counts), y_PD.split(pairs.counts), pairs.running
    ):
        torch.mm(hidden_MF, w_out.rows(e).T, out=y_MD)
    gate_P = pairs.gate_P[pairs.by_token_P].to(y_PD.dtype)
    return F.embedding_bag(
        pairs.by_token_P, y_PD, pairs.first_X, mode="sum", per_sample_weights=gate_P
    )

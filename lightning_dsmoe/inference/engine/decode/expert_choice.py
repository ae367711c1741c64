"""The experts that a few tokens need together.

Shapes: T tokens, N experts (those that were not removed), K chosen experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.weights.matvec import materialize
from lightning_dsmoe.routing import AllExperts, Routing, Selection, TopK
from lightning_dsmoe.routing.removed import remaining_mask, remaining_probs, select
from lightning_dsmoe.routing.selection import rank

_MIN_DYNAMIC_SIZE = 2  # sizes known only at run time may not be 1 in a compiled graph


class ChosenExperts(NamedTuple):
    """Experts to run, and their gates.

    Shape:
        experts_K: numbers of the experts that any token runs; None for all. A single one can stand
            twice, the second time under gates of zero.
        gates_KT: gate of each of them for each token, zero where a token does not run it.
    """

    experts_K: Tensor | None
    gates_KT: Tensor


def choose_experts(
    selection: Selection, routing: Routing, remaining: Tensor | None = None
) -> ChosenExperts:
    """Apply a selection to the routing of a few tokens.

    The number of chosen experts is a constant for one token and `TopK`; otherwise it depends on
    the probabilities, so that no more weights are read than are needed.

    Args:
        selection: the selection.
        routing: what the router says.
        remaining: the experts that were not removed, among which all are numbered; None for all.
    """
    if isinstance(selection, AllExperts):
        return ChosenExperts(None, select(selection, routing, remaining).weight.T)
    probs_TN = remaining_probs(selection, routing, remaining)
    n_tokens, n_experts = probs_TN.shape
    if type(selection) is TopK and n_tokens == 1:
        logits_TN = routing.logits if remaining is None else routing.logits[:, remaining]
        return _choose_top_k(selection, Routing(logits_TN, probs_TN))
    active_TN = materialize(remaining_mask(selection, routing, remaining))
    gates_TN = materialize(selection.weigh(probs_TN, active_TN))
    any_N = active_TN.any(0)
    count = any_N.sum()
    n_chosen = count.clamp_min(_MIN_DYNAMIC_SIZE).item()
    torch._check(n_chosen >= _MIN_DYNAMIC_SIZE)
    torch._check(n_chosen <= max(n_experts, _MIN_DYNAMIC_SIZE))
    places = torch.arange(n_experts, device=probs_TN.device)
    before_N = materialize((any_N & (places < places[:, None])).sum(-1))
    slots_K = torch.arange(n_chosen, device=probs_TN.device)
    at_KN = (before_N == slots_K.minimum(count - 1)[:, None]) & any_N
    experts_K = materialize(torch.where(at_KN, places, 0).sum(-1))
    return ChosenExperts(experts_K, materialize(gates_TN.T[experts_K] * (slots_K < count)[:, None]))


def _choose_top_k(selection: TopK, routing: Routing) -> ChosenExperts:
    """The most probable experts of one token, ranked by their logits, which takes fewer steps."""
    ranks_N = materialize(rank(routing.logits)[0])
    slots_K = torch.arange(selection.k, device=ranks_N.device)
    at_KN = ranks_N == slots_K[:, None]
    places = torch.arange(len(ranks_N), device=ranks_N.device)
    experts_K = materialize(torch.where(at_KN, places, 0).sum(-1))
    gates_K1 = materialize(torch.where(at_KN, routing.probs, 0.0).sum(-1, keepdim=True))
    return ChosenExperts(
        experts_K, gates_K1 / gates_K1.sum() if selection.renormalize else gates_K1
    )

"""The experts that a few tokens need together.

Shapes: T tokens, N experts, K chosen experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.spelling import kept
from lightning_dsmoe.routing import AllExperts, Selection, TopK

_FEWEST_SLOTS = 2  # sizes known only at run time may not be 1 in a compiled graph


class Choice(NamedTuple):
    """Experts to run, and their gates.

    Shape:
        experts_K: numbers of the experts that any token runs, ascending; None for all. A single
            one can stand twice, the second time under gates of zero.
        gates_KT: gate of each of them for each token, zero where a token does not run it.
    """

    experts_K: Tensor | None
    gates_KT: Tensor


def choose(selection: Selection, probs_TN: Tensor) -> Choice:
    """Apply a selection to the probabilities of a few tokens.

    The number of chosen experts is a constant for one token and `TopK`; otherwise it depends on
    the probabilities, so that no more weights are read than are needed.
    """
    if isinstance(selection, AllExperts):
        return Choice(None, probs_TN.T)
    n_experts = probs_TN.shape[1]
    active_TN = kept(selection.mask(probs_TN))
    gates_TN = kept(selection.weigh(probs_TN, active_TN))
    any_N = active_TN.any(0)
    if isinstance(selection, TopK) and len(probs_TN) == 1:
        return _pick(gates_TN, any_N, torch.arange(selection.k, device=probs_TN.device))
    count = any_N.sum()
    n_slots = count.clamp_min(_FEWEST_SLOTS).item()
    torch._check(n_slots >= _FEWEST_SLOTS)
    torch._check(n_slots <= max(n_experts, _FEWEST_SLOTS))
    slots = torch.arange(n_slots, device=probs_TN.device)
    experts_K, gates_KT = _pick(gates_TN, any_N, slots.minimum(count - 1))
    return Choice(experts_K, kept(gates_KT * (slots < count)[:, None]))


def _pick(gates_TN: Tensor, any_N: Tensor, slots_K: Tensor) -> Choice:
    """The experts that stand at given places among those that run, and their gates."""
    places = torch.arange(len(any_N), device=any_N.device)
    before_N = kept((any_N & (places < places[:, None])).sum(-1))
    at_KN = (before_N == slots_K[:, None]) & any_N
    experts_K = kept(torch.where(at_KN, places, 0).sum(-1))
    return Choice(experts_K, kept(gates_TN.T[experts_K]))

"""The experts that a few tokens need together.

Shapes: T tokens, N experts, K chosen experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.spelling import kept
from lightning_dsmoe.routing import AllExperts, Selection, TopK


class Choice(NamedTuple):
    """Experts to run, and their gates.

    Shape:
        experts_K: numbers of the experts that any token runs, ascending; None for all.
        gates_TK: gate of each of them for each token, zero where a token does not run it.
    """

    experts_K: Tensor | None
    gates_TK: Tensor


def choose(selection: Selection, probs_TN: Tensor) -> Choice:
    """Apply a selection to the probabilities of a few tokens."""
    n_tokens, n_experts = probs_TN.shape
    if isinstance(selection, AllExperts):
        return Choice(None, probs_TN)
    if isinstance(selection, TopK):
        active_TN = _top(probs_TN, selection.k)
    else:
        active_TN = selection.mask(probs_TN)
    gates_TN = kept(selection.weigh(probs_TN, active_TN))
    if isinstance(selection, TopK) and n_tokens == 1:
        experts_K = _positions(active_TN[0], selection.k)
    else:
        experts_K = active_TN.any(0).nonzero()[:, 0]
        torch._check(experts_K.shape[0] >= 1)
        torch._check(experts_K.shape[0] <= n_experts)
    return Choice(experts_K, kept(gates_TN[:, experts_K]))


def _top(probs_TN: Tensor, k: int) -> Tensor:
    """The k largest of each row, lower numbers first among equals, by counting larger ones."""
    places = torch.arange(probs_TN.shape[1], device=probs_TN.device)
    other, own = probs_TN[:, None, :], probs_TN[:, :, None]
    ahead = (other > own) | ((other == own) & (places < places[:, None]))
    return kept(ahead.sum(-1)) < k


def _positions(active_N: Tensor, k: int) -> Tensor:
    """Numbers of the k true entries, ascending."""
    places = torch.arange(active_N.shape[0], device=active_N.device)
    before_N = kept((active_N & (places < places[:, None])).sum(-1))
    slots = torch.arange(k, device=active_N.device)[:, None]
    return kept(((before_N == slots) & active_N).to(places.dtype).mul(places).sum(-1))

"""Selections where some experts were removed and their router was left whole.

A selection then chooses among the experts that remain, by scores and a number E that are those of
the whole mixture, so that nothing changes for a token that would have chosen no other. Their gates
stay the same too; with `renormalize` they are divided by the sum over those that run.

Shapes: E experts that the router scores, R of them that remain; leading dimensions are free.
"""

import torch
from torch import Tensor

from lightning_dsmoe.routing.routing import Routing
from lightning_dsmoe.routing.selection import Gates, Selection, check_selection

_ALMOST_NOTHING = 1e-30


def select(selection: Selection, routing: Routing, remaining: Tensor | None) -> Gates:
    """Gates `[..., R]` of the experts that run.

    Args:
        selection: the selection.
        routing: what the router says of all E experts.
        remaining: numbers of the experts that remain, ascending; None for all.

    Raises:
        TypeError: if the selection is none.
    """
    check_selection(selection)
    if remaining is None:
        return selection(routing.probs)
    active = remaining_mask(selection, routing, remaining)
    return Gates(selection.weigh(remaining_probs(selection, routing, remaining), active), active)


def remaining_mask(selection: Selection, routing: Routing, remaining: Tensor | None) -> Tensor:
    """The experts that run, bool `[..., R]`, one or more in each row."""
    mask = running_mask(selection, routing, remaining)
    return mask if remaining is None else mask[..., remaining]


def running_mask(selection: Selection, routing: Routing, remaining: Tensor | None) -> Tensor:
    """The same among all experts, bool `[..., E]`."""
    if remaining is None:
        return selection.mask(routing.probs)
    places_E = torch.arange(routing.probs.shape[-1], device=remaining.device)
    remains_E = (places_E[:, None] == remaining).any(-1)
    return selection.mask(routing.probs.masked_fill(~remains_E, -1.0)) & remains_E


def remaining_probs(selection: Selection, routing: Routing, remaining: Tensor | None) -> Tensor:
    """The probabilities `[..., R]` that a selection makes gates of.

    What it renormalizes is the softmax over the experts that remain where a removed one has all the
    probability, for it has the same ratios and does not vanish.
    """
    if remaining is None:
        return routing.probs
    probs = routing.probs[..., remaining]
    if not selection.renormalize:
        return probs
    logits = routing.logits[..., remaining]
    return torch.where(probs.sum(-1, keepdim=True) > _ALMOST_NOTHING, probs, logits.softmax(-1))

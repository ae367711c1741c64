"""How often two versions of a model choose the same experts.

Shapes: leading dimensions (tokens) are free.
"""

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Routings
from lightning_dsmoe.metrics.active_parameters import active_masks
from lightning_dsmoe.routing import SelectionPlan


def routing_agreement(
    found: Routings, expected: Routings, plan: SelectionPlan, mask: Tensor
) -> Tensor:
    """Share of selections, one for each token and router, that are the same experts in both.

    Args:
        found: routings of one model, such as one in 8 bits.
        expected: routings of the other on the same tokens.
        plan: the selections.
        mask: tokens that count, bool `[...]`.

    Returns:
        A number from 0 to 1; 1 if there are no routers or no tokens.
    """
    experts, attention = active_masks(found, plan)
    other_experts, other_attention = active_masks(expected, plan)
    pairs = zip(experts + attention, other_experts + other_attention, strict=True)
    same = [
        (own == other).all(-1)[mask.bool()]
        for own, other in pairs
        if own is not None and other is not None
    ]
    if not same or not mask.any():
        return torch.ones((), device=mask.device)
    return torch.stack(same).float().mean()

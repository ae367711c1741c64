"""How often two versions of a model select the same experts.

Shapes: leading dimensions (tokens) are free.
"""

import torch
from torch import Tensor

from lightning_dsmoe.metrics.active_parameters import active_masks
from lightning_dsmoe.moved import renamed_options
from lightning_dsmoe.routing import Routings, SelectionPlan


@renamed_options(found="routings", expected="other_routings")
def routing_agreement(
    routings: Routings, other_routings: Routings, plan: SelectionPlan, mask: Tensor
) -> Tensor:
    """Share of the selections, one for each token and router, with the same experts in both models.

    Args:
        routings: routings of one model, such as an 8-bit one.
        other_routings: routings of the other model on the same tokens.
        plan: which experts run.
        mask: tokens that count, bool `[...]`.

    Returns:
        A scalar from 0 to 1; 1 if there are no routers or no tokens.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.metrics import routing_agreement
        >>> from lightning_dsmoe.routing import Routing, Routings, SelectionPlan, TopK
        >>> def routings(logits):
        ...     return Routings((Routing(logits, logits.softmax(-1)),), (None,))
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> other_logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
        >>> plan = SelectionPlan(experts=TopK(1))
        >>> routing_agreement(
        ...     routings(logits), routings(other_logits), plan, torch.ones(2, dtype=torch.bool)
        ... )
        tensor(0.5000)
    """
    active, other_active = active_masks(routings, plan), active_masks(other_routings, plan)
    same = [
        (running == other_active[name]).all(-1)[mask.bool()] for name, running in active.items()
    ]
    if not same or not mask.any():
        return torch.ones((), device=mask.device)
    return torch.stack(same).float().mean()

"""The losses of all routers of a decoder, weighted and added up.

Shapes: R routers, B sequences, T positions, E experts.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dsmoe.decoder import Routings
from lightning_dsmoe.losses import load_balancing_losses, router_z_loss, routing_entropies
from lightning_dsmoe.routing import SelectionPlan


class RoutingLossWeights(NamedTuple):
    """Weights of the losses of a router.

    Args:
        expert_mi: alpha of the feed-forward routers.
        attention_mi: alpha of the attention routers.
        load_balancing: beta of every router.
        router_z: gamma of every router.
    """

    expert_mi: float
    attention_mi: float
    load_balancing: float = 0.0
    router_z: float = 0.0


class RoutingLosses(NamedTuple):
    """The weighted sum of the losses of all routers, and their means for logging.

    Args:
        total: scalar, in nats.
        terms: detached scalars, means over the routers of a kind, in nats, by names such as
            "experts/mutual_information".
    """

    total: Tensor
    terms: dict[str, Tensor]


def routing_losses(
    routings: Routings,
    plan: SelectionPlan,
    weights: RoutingLossWeights,
    mask: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
) -> RoutingLosses:
    """Sum over routers of (alpha L_MI + beta L_balance + gamma L_z).

    Args:
        routings: the routing of every layer.
        plan: the experts that ran.
        weights: alpha, beta and gamma.
        mask: tokens that count, bool `[B, T]`.
        group: process group over whose tokens all means are, as in `mutual_information_loss`.

    Raises:
        ValueError: if plan and routings have different numbers of layers.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.decoder import Routings
        >>> from lightning_dsmoe.routing import Routing, SelectionPlan
        >>> from lightning_dsmoe.training.routing_losses import RoutingLossWeights, routing_losses
        >>> probs = torch.eye(4)[None]  # four tokens, each with an expert of its own
        >>> routings = Routings((Routing(probs.log(), probs),), (None,))
        >>> weights = RoutingLossWeights(expert_mi=0.5, attention_mi=0.5)
        >>> mask = torch.ones(1, 4, dtype=torch.bool)
        >>> losses = routing_losses(routings, SelectionPlan.uniform(1), weights, mask)
        >>> round(losses.terms["experts/mutual_information"].item(), 4)  # ln 4
        1.3863
        >>> round(losses.total.item(), 4)
        -0.6931
    """
    total = torch.zeros((), device=mask.device)
    terms = {}
    for kind, routings_of_kind, selections, mi_weight in (
        ("experts", routings.experts, plan.experts, weights.expert_mi),
        ("attention", routings.attention, plan.attention, weights.attention_mi),
    ):
        pairs = zip(routings_of_kind, selections, strict=True)
        routed = [(r, s) for r, s in pairs if r is not None]
        if not routed:
            continue
        probs_RBTE = torch.stack([r.probs for r, _ in routed])
        entropies = routing_entropies(probs_RBTE, mask, group=group)
        mi_R = entropies.marginal - entropies.conditional
        total = total - mi_weight * mi_R.sum()
        terms[f"{kind}/mutual_information"] = mi_R.mean()
        terms[f"{kind}/entropy"] = entropies.conditional.mean()
        terms[f"{kind}/balance_entropy"] = entropies.marginal.mean()
        if weights.load_balancing:
            active_RBTE = torch.stack([s.mask(r.probs) for r, s in routed])
            balance_R = load_balancing_losses(probs_RBTE, active_RBTE, mask, group=group)
            total = total + weights.load_balancing * balance_R.sum()
        if weights.router_z:
            logits_RBTE = torch.stack([r.logits for r, _ in routed])
            masks_RBT = mask.expand(logits_RBTE.shape[:-1])
            z_mean = router_z_loss(logits_RBTE, masks_RBT, group=group)
            total = total + weights.router_z * len(routed) * z_mean
    return RoutingLosses(total, {name: value.detach() for name, value in terms.items()})

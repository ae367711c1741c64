"""How routing differs between two checkpoints of one training run.

Shapes: E experts.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lightning_dsmoe.analysis.report.utilization import ModelUse


class RouterDrift(NamedTuple):
    """Difference between a router and the same router in another checkpoint.

    Args:
        change_E: gate share of each expert minus its gate share in the other checkpoint.
        changed: share of the tokens whose top-1 expert differs.
    """

    change_E: Tensor
    changed: float


class Drift(NamedTuple):
    """Difference between a model and another checkpoint of it, on the same text.

    Args:
        layers: of each routed layer, by name.
        loss: loss of the other checkpoint with all experts, in nats per token.
        plan_loss: loss of the other checkpoint under the plan, in nats per token.
    """

    layers: Mapping[str, RouterDrift]
    loss: float
    plan_loss: float


def drift(use: ModelUse, other: ModelUse) -> Drift:
    """Compare a model with another checkpoint of it, both measured on the same text."""
    routers = {
        name: RouterDrift(
            own.gates.share - other.layers[name].gates.share,
            (own.best_N != other.layers[name].best_N).float().mean().item(),
        )
        for name, own in use.layers.items()
    }
    return Drift(routers, other.loss, other.plan_loss)

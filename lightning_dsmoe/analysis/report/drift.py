"""How routing differs between two checkpoints of one training run.

Shapes: E experts.
"""

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
        experts: of each layer, None without a mixture of experts.
        attention: of each layer, None without a mixture of attention heads.
        loss: loss of the other checkpoint with all experts, in nats per token.
        plan_loss: loss of the other checkpoint under the plan, in nats per token.
    """

    experts: list[RouterDrift | None]
    attention: list[RouterDrift | None]
    loss: float
    plan_loss: float


def drift(use: ModelUse, other: ModelUse) -> Drift:
    """Compare a model with another checkpoint of it, both measured on the same text."""
    experts, attention = (
        [
            None
            if own is None or before is None
            else RouterDrift(
                own.gates.share - before.gates.share,
                (own.best_N != before.best_N).float().mean().item(),
            )
            for own, before in zip(*layers, strict=True)
        ]
        for layers in ((use.experts, other.experts), (use.attention, other.attention))
    )
    return Drift(experts, attention, other.loss, other.plan_loss)

"""The training objective of a language model.

Shapes: B sequences, T positions, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dsmoe.data.loader import Batch
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.decoder import DecoderOutput, Routings
from lightning_dsmoe.losses import RoutingLoss, consistency_loss
from lightning_dsmoe.losses.cross_entropy import summed_cross_entropy
from lightning_dsmoe.losses.token_sums import sum_over_ranks
from lightning_dsmoe.routing import Routing, SelectionPlan


def mean_cross_entropy(
    logits_BTV: Tensor, labels_BT: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Mean of -ln p(label) over the tokens that count, in nats; 0 if none counts.

    Args:
        logits_BTV: logits of the next tokens.
        labels_BT: the next tokens; -100 does not count.
        group: process group over whose tokens the mean is, as in `mutual_information_loss`.
    """
    nll = summed_cross_entropy(logits_BTV, labels_BT)
    totals = torch.stack([nll, (labels_BT != IGNORED).sum().to(nll)])
    total, count = sum_over_ranks(totals, group).unbind()
    return total / count.clamp_min(1)


class Step(NamedTuple):
    """A batch that ran under a plan.

    Args:
        loss: cross entropy in nats, mean over the tokens that count, of all ranks if they share it;
            0 if none counts.
        logits_BTV: the predictions.
        routings: the routing of every layer.
        mask_BT: tokens that count.
        plan: the experts that ran.
    """

    loss: Tensor
    logits_BTV: Tensor
    routings: Routings
    mask_BT: Tensor
    plan: SelectionPlan

    @classmethod
    def of(
        cls,
        model: Callable[[Tensor, SelectionPlan], DecoderOutput],
        batch: Batch,
        plan: SelectionPlan,
        group: dist.ProcessGroup | None = None,
    ) -> Self:
        """Run a batch.

        Args:
            model: gives logits and routings of tokens under a plan.
            batch: this rank's tokens `input_ids` and the next tokens `labels`, `[B, T]`.
            plan: the experts that run.
            group: process group over whose tokens the mean is, as in `mutual_information_loss`.
        """
        output, labels_BT = model(batch["input_ids"], plan), batch["labels"]
        loss = mean_cross_entropy(output.logits, labels_BT, group)
        return cls(loss, output.logits, output.routings, labels_BT != IGNORED, plan)

    def results(self) -> dict[str, Any]:
        """What callbacks read from a step."""
        experts, attention = (
            tuple(None if r is None else Routing(r.logits.detach(), r.probs.detach()) for r in kind)
            for kind in self.routings
        )
        return {"routings": Routings(experts, attention), "mask": self.mask_BT}


def objective(
    step: Step,
    routing_loss: RoutingLoss,
    group: dist.ProcessGroup | None = None,
    *,
    by_layer: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_LM + the weighted losses of all routers.

    Args:
        step: a batch under the plan that is trained.
        routing_loss: the losses of the routers.
        group: process group over whose tokens all means are, as in `mutual_information_loss`.
        by_layer: also give the mutual information of each router.

    Returns:
        The loss to minimize, and its detached terms by name, for logging.
    """
    total, terms = routing_loss.losses(
        step.routings, step.mask_BT, plan=step.plan, group=group, by_layer=by_layer
    )
    return step.loss + total, terms


def consistent_objective(
    sparse: Step,
    dense: Step,
    routing_loss: RoutingLoss,
    consistency_weight: float,
    group: dist.ProcessGroup | None = None,
    *,
    by_layer: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(L under a plan + L with all experts) / 2 + delta L_consistency.

    Source: R-Drop, arXiv 2106.14448, eq. 4, halved: delta is half of its alpha.

    Args:
        sparse: a batch under the plan.
        dense: the same batch with all experts.
        routing_loss: the losses of the routers.
        consistency_weight: delta.
        group: as in `objective`.
        by_layer: as in `objective`, of the batch under the plan.

    Returns:
        As `objective`.
    """
    total, terms = objective(sparse, routing_loss, group, by_layer=by_layer)
    dense_total, _ = objective(dense, routing_loss, group)
    consistency = consistency_loss(dense.logits_BTV, sparse.logits_BTV, sparse.mask_BT, group=group)
    more = {"all_experts/loss": dense.loss.detach(), "consistency": consistency.detach()}
    return (total + dense_total) / 2 + consistency_weight * consistency, terms | more

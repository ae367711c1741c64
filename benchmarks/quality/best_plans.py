"""The best plan of any model at a share of its hidden parameters, found on one text."""

from typing import NamedTuple

from benchmarks.quality.frontier import threshold
from lightning_dsmoe import SelectionPlan
from lightning_dsmoe.analysis.evaluation import PlanResult, evaluate
from lightning_dsmoe.analysis.measured import MeasuredBatches
from lightning_dsmoe.analysis.plans.routing_statistics import Statistics
from lightning_dsmoe.analysis.plans.solvers import uniform_numbers

TOLERANCE = 0.003
"""By how much a plan may run more than its share, as routers choose a little differently under it
than with all experts."""


class Best(NamedTuple):
    """A plan, in words, and what it gives on the text it was found on."""

    words: str
    plan: SelectionPlan
    found: PlanResult


def best_plan(on: MeasuredBatches, statistics: Statistics, share: float) -> Best | None:
    """The uniform plan of a share with the lowest loss; None if one expert in each layer is more.

    Tried are one threshold for all routers, and one number of experts for all.

    Args:
        on: the model on the text.
        statistics: of its routers there.
        share: of the hidden parameters.
    """

    def running(plan: SelectionPlan) -> float:
        return evaluate(on, plan).active_share_mean

    tried = [(f"top {plan.experts.k}", plan) for plan in uniform_numbers(statistics, share)[-1:]]
    if (plan := threshold(statistics, share, running)) is not None:
        eps = next(iter(plan.selections(on.layers).values())).eps
        tried.append((f"threshold {eps:.3g}", plan))
    found = [Best(words, plan, evaluate(on, plan)) for words, plan in tried]
    fitting = [each for each in found if each.found.active_share_mean <= share + TOLERANCE]
    return min(fitting, key=lambda each: each.found.loss, default=None)

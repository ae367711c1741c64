"""Calibration: a plan found on one half of the data, and what it is worth on the other."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from lightning_dsmoe.analysis.evaluation import Found, PlanResult, evaluate, measured
from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.analysis.measured import MeasuredText, SampleLoss
from lightning_dsmoe.analysis.plans.divergence import divergence
from lightning_dsmoe.analysis.plans.routing_statistics import routing_statistics
from lightning_dsmoe.analysis.plans.search import PlanSearch
from lightning_dsmoe.analysis.plans.solvers import FIXED_NUMBERS, THRESHOLDS, best_uniform
from lightning_dsmoe.routing import SelectionPlan


class Calibration(NamedTuple):
    """A plan, and what was measured of it on data that it was not found on.

    Args:
        plan: the experts that run.
        result: the model under the plan.
        dense: the model with all experts.
        uniform: the best plan of at most the same share that treats all layers alike; None if there
            is none.
    """

    plan: SelectionPlan
    result: PlanResult
    dense: PlanResult
    uniform: Found | None


def calibrate(
    model: nn.Module,
    data: HeldOut | Iterable[Any],
    loss: SampleLoss | None = None,
    *,
    budget: float | None = None,
    max_loss_increase: float | None = None,
    fixed: bool = False,
    on_progress: Callable[[str], object] = lambda doing: None,
    **options: Any,
) -> Calibration:
    """Search for the plan that loses least: which experts to run in each layer.

    The plan is found on the first half of the data and judged on the second. The search follows
    the divergence of a language model from all its experts, or else the loss; see `PlanSearch`.

    Args:
        model: a `SparseModel`; or, with `loss`, any model with routed layers.
        data: the text; or, with `loss`, batches, such as a `DataLoader`.
        loss: gives the loss of every sample of a batch, `[B]`, called as `loss(model, batch)`.
        budget: largest active share (share of the hidden parameters, mean over tokens), such as
            0.2; under thresholds the measured share can be slightly larger.
        max_loss_increase: instead of a budget, the largest increase of the loss, such as 0.005.
        fixed: fixed numbers of experts (top-k), the same for all tokens, instead of thresholds.
        on_progress: called with what is being done.
        options: `mask` and `outside` of `MeasuredBatches`, or `counts` of `MeasuredText`.

    Returns:
        The plan and its results.

    Raises:
        FloatingPointError: as `evaluate_plan` does.
        TypeError: as `evaluate_plan` does.
        ValueError: as `evaluate_plan` does, and if not exactly one of budget and max_loss_increase
            is given, it cannot be met, or there is too little data for two halves.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly
        >>> from lightning_dsmoe.analysis import calibrate
        >>> model = nn.Sequential(nn.Linear(4, 8), OutputOnly(MixtureOfExperts(8, 4, 16)))
        >>> def loss(model, batch):
        ...     x, label = batch
        ...     return nn.functional.cross_entropy(model(x), label, reduction="none")
        >>> batches = [(torch.randn(6, 4), torch.randint(8, (6,))) for _ in range(4)]
        >>> found = calibrate(model, batches, loss, budget=0.6, fixed=True)
        >>> found.plan.experts, found.result.active_share_mean < 0.6
        (TopK(renormalize=False, k=2), True)
    """
    if (budget is None) == (max_loss_increase is None):
        raise ValueError(
            "calibrate needs either a budget or a max_loss_increase, "
            f"got {budget} and {max_loss_increase}"
        )
    if max_loss_increase is not None and not max_loss_increase >= 0:
        raise ValueError(f"max_loss_increase must be 0 or more, got {max_loss_increase}")
    found_on, judged_on = measured(model, data, loss, **options).halves()
    on_progress("running all experts")
    statistics = routing_statistics(found_on)

    def measure(plan: SelectionPlan) -> PlanResult:
        on_progress("measuring plans on the first half")
        return evaluate(found_on, plan)

    diverge = None
    if isinstance(found_on, MeasuredText):
        diverge = partial(divergence, found_on.model, found_on.text)
    search = PlanSearch(statistics, measure, FIXED_NUMBERS if fixed else THRESHOLDS, diverge)
    if max_loss_increase is None:
        plan = search.within(budget or 0.0).plan
    else:
        plan = search.sparsest(max_loss_increase).plan
    on_progress("measuring the plan and uniform ones on the second half")
    unseen = partial(evaluate, judged_on)
    dense, result = unseen(SelectionPlan()), unseen(plan)
    uniform = best_uniform(routing_statistics(judged_on), result.active_share_mean, unseen)
    return Calibration(plan, result, dense, uniform)

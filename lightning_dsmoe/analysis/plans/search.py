"""Finding the selections of every layer that cost the least loss for a share of the parameters.

The plans are those that `solvers` makes of sensitivities. These are first measured, one router at a
time, and then tried out against the loss, all attention together and each router alone, beginning
with one threshold for all if `thresholds` are wanted. In the end plans that treat all layers alike
are tried too. From one plan to the next the loss, or what stands for it, must fall
by more than a standard error, as the plan is for other text.
"""

from collections.abc import Callable, Sequence
from functools import cache
from statistics import median
from typing import NamedTuple

from lightning_dsmoe.analysis.evaluation import Found, Measure, PlanResult
from lightning_dsmoe.analysis.plans.divergence import Diverge
from lightning_dsmoe.analysis.plans.routing_statistics import Statistics
from lightning_dsmoe.analysis.plans.solvers import (
    Sensitivities,
    Solver,
    alike,
    check_budget,
    even,
    plan_of,
    thresholds,
    uniform_mixed,
    uniform_numbers,
)
from lightning_dsmoe.routing import SelectionPlan, Threshold

_FACTORS = (2.0, 0.5)
_MOST_STEPS = 4
_HALVINGS = 7


class _Trial(NamedTuple):
    sensitivities: Sensitivities
    found: Found

    def or_better(self, other: "_Trial") -> "_Trial":
        """The other one if its loss is clearly lower."""
        return other if other.found.result.clearly_below(self.found.result) else self


def search(
    statistics: Statistics,
    budget: float,
    solve: Solver,
    measure: Measure,
    make_diverge: Callable[[], Diverge] | None = None,
) -> Found:
    """Find a plan of a share with as little loss as possible.

    A plan that treats all layers alike takes its place if it is clearly better: one of fixed
    numbers of experts or, unless `solve` makes those, of numbers for attention and a threshold for
    the feed-forward experts.

    Args:
        statistics: what the routers say of a text.
        budget: the share of the hidden parameters to run at the most, in the mean over tokens, as
            routers choose while all experts run; under thresholds they may choose some more.
        solve: `thresholds` or `fixed_numbers`.
        measure: evaluates a plan on that text.
        make_diverge: called to get what tells how far a plan is from all experts on that text, to
            judge by in place of the loss; not called if the loss of the first plan is clearly below
            that of all experts, as after sparse finishing. None judges by the loss in any case.

    Raises:
        ValueError: if one expert in each layer is more than the budget.
    """
    check_budget(statistics, budget)
    judge = measure = cache(measure)
    if make_diverge is not None:
        start = measure(solve(statistics, alike(statistics), budget))
        dense = measure(SelectionPlan.uniform(len(statistics.experts)))
        if not start.clearly_below(dense):
            judge = cache(_by_divergence(dense, make_diverge()))
    tuned = _tuned(statistics, budget, solve, judge).found
    plan = _or_alike(tuned, statistics, budget, solve, judge).plan
    return Found(plan, measure(plan))


def sparsest(statistics: Statistics, increase: float, solve: Solver, measure: Measure) -> Found:
    """Find a plan of the smallest share whose loss, as measured on the text, is not too high.

    The share is halved with sensitivities that are measured once. Better ones are searched for at
    the share that is found, and the halving goes on with those. A plan of the share found last that
    treats all layers alike takes its place as in `search`; sparser ones of that kind are not
    sought.

    Args:
        statistics: what the routers say of a text.
        increase: share of the loss with all experts to give up at the most.
        solve: `thresholds` or `fixed_numbers`.
        measure: evaluates a plan on that text.
    """
    measure = cache(measure)
    dense = SelectionPlan.uniform(len(statistics.experts))
    best = Found(dense, measure(dense))
    most_loss = best.result.loss * (1 + increase)

    def halved(best: Found, most: float, sensitivity: Sensitivities) -> tuple[Found, float]:
        least = statistics.least_share
        for _ in range(_HALVINGS):
            middle = (least + most) / 2
            plan = solve(statistics, sensitivity, middle)
            found = Found(plan, measure(plan))
            if found.result.loss <= most_loss:
                best, most = found, middle
            else:
                least = middle
        return best, most

    some = thresholds(statistics, even(statistics), (statistics.least_share + 1) / 2)
    best, budget = halved(best, 1.0, sensitivities(statistics, some, measure))
    tuned = _tuned(statistics, budget, solve, measure)
    if tuned.found.result.loss <= best.result.loss:
        best = tuned.found
    best, budget = halved(best, budget, tuned.sensitivities)
    return _or_alike(best, statistics, budget, solve, measure)


def sensitivities(statistics: Statistics, plan: SelectionPlan, measure: Measure) -> Sensitivities:
    """Loss per probability that a router drops, measured with only that router under the plan."""
    dense = SelectionPlan.uniform(plan.n_layers)
    base = measure(dense).loss
    found: list[float | None] = []
    for number, (router, selection) in enumerate(
        zip(statistics.routers, plan.experts + plan.attention, strict=True)
    ):
        mass = 0.0
        if router is not None and isinstance(selection, Threshold):
            mass = router.dropped_mass(selection.eps).item()
        if not mass:
            found.append(None)
            continue
        alone = [*dense.experts, *dense.attention]
        alone[number] = selection
        found.append(max(0.0, measure(plan_of(alone)).loss - base) / mass)
    typical = median([s for s in found if s] or [1.0])
    return tuple(typical if s is None else max(s, typical / 20) for s in found)


def _by_divergence(dense: PlanResult, diverge: Diverge) -> Measure:
    """The divergence of a plan, summed over the text, as if it were a loss."""

    def judge(plan: SelectionPlan) -> PlanResult:
        windows = diverge(plan)
        return dense._replace(loss=sum(windows), window_losses=windows)

    return judge


def _or_alike(
    best: Found, statistics: Statistics, budget: float, solve: Solver, measure: Measure
) -> Found:
    """The plan of a budget that treats all layers alike, if one is clearly better than the best."""
    rivals = uniform_numbers(statistics, budget)
    if solve is thresholds:
        rivals += uniform_mixed(statistics, budget)
    for plan in rivals:
        found = Found(plan, measure(plan))
        if found.result.clearly_below(best.result):
            best = found
    return best


def _tuned(statistics: Statistics, budget: float, solve: Solver, measure: Measure) -> _Trial:
    """Sensitivities whose plan none is clearly better than, of many that are tried out."""

    def trial(tried: Sensitivities) -> _Trial:
        plan = solve(statistics, tried, budget)
        return _Trial(tried, Found(plan, measure(plan)))

    flat = even(statistics)
    measured = sensitivities(statistics, thresholds(statistics, flat, budget), measure)
    best = trial(alike(statistics))
    for start in (flat, measured, tuple(s**0.5 for s in measured)):
        best = best.or_better(trial(start))
    layers = len(statistics.experts)
    alone = [[n] for n, router in enumerate(statistics.routers) if router is not None]
    for group in [list(range(layers, 2 * layers)), *alone]:
        best = _climbed(best, group, trial)
    return best


def _climbed(
    start: _Trial, group: Sequence[int], trial: Callable[[Sensitivities], _Trial]
) -> _Trial:
    """Make some routers more or else less sensitive as long as that clearly helps."""
    best = start
    for factor in _FACTORS:
        for _ in range(_MOST_STEPS):
            tried = trial(
                tuple(s * factor if n in group else s for n, s in enumerate(best.sensitivities))
            )
            better = best.or_better(tried)
            if better is best:
                break
            best = better
        if best is not start:
            break
    return best

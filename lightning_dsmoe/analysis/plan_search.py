"""Finding the selections of every layer that cost the least loss for a share of the parameters.

An expert that does not run for a token is taken to cost s_r S_e, its gate times the sensitivity s_r
of its router, and to save its parameters c_r. Under that model the best plan of a share keeps the
experts with s_r S_e > l c_r for one number l: a threshold for each router, or the best K of each.
Sensitivities are first measured, one router at a time, and then tried out against the loss.
"""

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from lightning_dsmoe.analysis.evaluation import PlanResult
from lightning_dsmoe.analysis.routing_statistics import RouterStatistics, Statistics
from lightning_dsmoe.routing import AllExperts, Selection, SelectionPlan, Threshold, TopK

Sensitivities = tuple[float, ...]
"""Of each router: those of feed-forward experts by layer, then those of attention experts."""

Solver = Callable[[Statistics, Sensitivities, float], SelectionPlan]
Measure = Callable[[SelectionPlan], PlanResult]

_HALVINGS = 60
_WIDEST = 1e9
_MOST = 1 - 2**-20  # of N, which no N S_e can exceed
_TRIALS = (2.0, 0.5)


class Found(NamedTuple):
    """A plan, and what was measured of it on the text that it was found on."""

    plan: SelectionPlan
    result: PlanResult


def search(statistics: Statistics, budget: float, solve: Solver, measure: Measure) -> Found:
    """Find a plan of a share with as little loss as possible.

    Args:
        statistics: what the routers say of a text.
        budget: the share of the hidden parameters to run at the most, in the mean over tokens.
        solve: `thresholds` or `fixed_numbers`.
        measure: evaluates a plan on that text.

    Raises:
        ValueError: if one expert in each layer is more than the budget.
    """
    check_budget(statistics, budget)
    routers = _routers(statistics)
    even: Sensitivities = (1.0,) * len(routers)
    best_of, best = even, _found(solve(statistics, even, budget), measure)
    measured = sensitivities(statistics, thresholds(statistics, even, budget), measure)
    for tried in (measured, tuple(s**0.5 for s in measured)):
        found = _found(solve(statistics, tried, budget), measure)
        if found.result.loss < best.result.loss:
            best_of, best = tried, found
    for number, router in enumerate(routers):
        for factor in _TRIALS if router is not None else ():
            tried = tuple(s * factor if n == number else s for n, s in enumerate(best_of))
            found = _found(solve(statistics, tried, budget), measure)
            if found.result.loss < best.result.loss:
                best_of, best = tried, found
                break
    return best


def sensitivities(statistics: Statistics, plan: SelectionPlan, measure: Measure) -> Sensitivities:
    """Loss per probability that a router drops, measured with only that router under the plan."""
    routers = _routers(statistics)
    dense = SelectionPlan.uniform(plan.n_layers)
    base = measure(dense).loss
    found: list[float | None] = []
    for number, (router, selection) in enumerate(
        zip(routers, plan.experts + plan.attention, strict=True)
    ):
        mass = 0.0
        if router is not None and isinstance(selection, Threshold):
            mass = router.dropped_mass(selection.eps).item()
        if not mass:
            found.append(None)
            continue
        alone = _selections(dense)
        alone[number] = selection
        found.append(max(0.0, measure(_plan(alone)).loss - base) / mass)
    typical = median([s for s in found if s] or [1.0])
    return tuple(typical if s is None else max(s, typical / 20) for s in found)


def thresholds(statistics: Statistics, sensitivity: Sensitivities, budget: float) -> SelectionPlan:
    """The thresholds of every router that run a share of the parameters."""
    routers = _routers(statistics)
    layers = len(statistics.experts)

    def eps(price: float) -> list[float]:
        return [
            0.0 if router is None else router.n_experts * price * router.per_expert / s
            for router, s in zip(routers, sensitivity, strict=True)
        ]

    low, high = 1 / _WIDEST, _WIDEST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        values = eps(middle)
        if statistics.share(values[:layers], values[layers:]) > budget:
            low = middle
        else:
            high = middle
    return _plan(
        [
            AllExperts() if router is None else Threshold(min(value, _MOST * router.n_experts))
            for router, value in zip(routers, eps(high), strict=True)
        ]
    )


def fixed_numbers(
    statistics: Statistics, sensitivity: Sensitivities, budget: float
) -> SelectionPlan:
    """The number of experts of every router that run at most a share of the parameters."""
    numbers = [1 for _ in _routers(statistics)]
    routers = {n: router for n, router in enumerate(_routers(statistics)) if router is not None}
    gains = {n: _gains(router, sensitivity[n]) for n, router in routers.items()}
    room = budget * statistics.hidden - statistics.always
    room -= sum(router.per_expert for router in routers.values())
    while True:
        fitting = [
            n
            for n, router in routers.items()
            if numbers[n] < router.n_experts and router.per_expert <= room
        ]
        if not fitting:
            break
        best = max(fitting, key=lambda n: gains[n][numbers[n]])
        room -= routers[best].per_expert
        numbers[best] += 1
    return _plan([TopK(k) if n in routers else AllExperts() for n, k in enumerate(numbers)])


def check_budget(statistics: Statistics, budget: float) -> None:
    """Raise a ValueError if a share is less than one expert in each layer, or more than all."""
    if not statistics.least_share <= budget <= 1:
        raise ValueError(
            f"a budget of {budget:g} cannot be met: one expert in each layer is "
            f"{statistics.least_share:.4f} of the hidden parameters, all are 1"
        )


def _gains(router: RouterStatistics, sensitivity: float) -> list[float]:
    """What the best expert, the second one and so on give for a parameter."""
    means: list[float] = router.probs_XN.double().mean(0).tolist()
    return [sensitivity * mean / router.per_expert for mean in means]


def _routers(statistics: Statistics) -> list[RouterStatistics | None]:
    return [*statistics.experts, *statistics.attention]


def _selections(plan: SelectionPlan) -> list[Selection]:
    return [*plan.experts, *plan.attention]


def _plan(selections: list[Selection]) -> SelectionPlan:
    layers = len(selections) // 2
    return SelectionPlan(tuple(selections[:layers]), tuple(selections[layers:]))


def _found(plan: SelectionPlan, measure: Measure) -> Found:
    return Found(plan, measure(plan))

"""The best plan of a share of the parameters, if gates measure what an expert is worth.

Leaving out an expert for a token is assumed to cost s_r S_e, its gate times the sensitivity s_r of
its router, and to save its parameters c_r. Then the best plan of a share runs the experts with
s_r S_e > l c_r for one price l: a threshold for each router, or the best K of each.

Uniform plans, which treat all layers alike, are what others are compared with.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, get_args

from lightning_dsmoe.analysis.evaluation import Found, Measure
from lightning_dsmoe.analysis.plans.routing_statistics import Statistics
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK
from lightning_dsmoe.routing.routing import Kind

Sensitivities = Mapping[str, float]
"""Of each router, by the name of its layer."""


class PlanFamily(NamedTuple):
    """Plans of one kind, `THRESHOLDS` or `FIXED_NUMBERS`.

    Args:
        solve: makes the best plan of a share, from statistics, sensitivities and the share.
        uniform: makes the uniform plans that may take its place, from statistics and the share.
    """

    solve: Callable[[Statistics, Sensitivities, float], SelectionPlan]
    uniform: Callable[[Statistics, float], list[SelectionPlan]]


_PRICE_BISECTIONS = 40
_WIDEST = 1e18  # of prices: covers any size of an expert and any sensitivity
_ALMOST_ONE = 1 - 2**-20  # of E, which no E·S_e can exceed


def even(statistics: Statistics) -> Sensitivities:
    """The same sensitivity everywhere."""
    return dict.fromkeys(statistics.layers, 1.0)


def alike(statistics: Statistics) -> Sensitivities:
    """The sensitivities that make all thresholds equal."""
    return {n: float(r.n_experts * r.per_expert) for n, r in statistics.layers.items()}


def thresholds(statistics: Statistics, sensitivity: Sensitivities, budget: float) -> SelectionPlan:
    """The thresholds of every router that run a share of the parameters.

    Args:
        statistics: gates of a text, from `routing_statistics`.
        sensitivity: of each router.
        budget: share of the hidden parameters, in the mean over tokens.
    """
    routers = statistics.layers

    def eps(price: float) -> dict[str, float]:
        return {n: r.n_experts * price * r.per_expert / sensitivity[n] for n, r in routers.items()}

    low, high = 1 / _WIDEST, _WIDEST
    for _ in range(_PRICE_BISECTIONS):
        middle = (low * high) ** 0.5
        if statistics.share(eps(middle)) > budget:
            low = middle
        else:
            high = middle
    found = eps(high)
    return SelectionPlan.of_layers(
        {
            name: (router.kind, Threshold(min(found[name], _ALMOST_ONE * router.n_experts)))
            for name, router in routers.items()
        }
    )


def fixed_numbers(
    statistics: Statistics, sensitivity: Sensitivities, budget: float
) -> SelectionPlan:
    """The number of experts of every router that run at most a share of the parameters.

    Adds one expert at a time, the one that gives most for its parameters. Gains fall with each
    expert of a router, so only the last few parameters of the budget may be spent better.

    Args:
        statistics: gates of a text, from `routing_statistics`.
        sensitivity: of each router.
        budget: share of the hidden parameters.
    """
    routers = statistics.layers
    numbers = dict.fromkeys(routers, 1)
    gains = {
        n: (router.probs_NE.double().mean(0) * sensitivity[n] / router.per_expert).tolist()
        for n, router in routers.items()
    }
    room = budget * statistics.hidden - statistics.always
    room -= sum(router.per_expert for router in routers.values())
    while fitting := [
        n for n, r in routers.items() if numbers[n] < r.n_experts and r.per_expert <= room
    ]:
        best = max(fitting, key=lambda n: gains[n][numbers[n]])
        room -= routers[best].per_expert
        numbers[best] += 1
    return SelectionPlan.of_layers({n: (r.kind, TopK(numbers[n])) for n, r in routers.items()})


def uniform_plans(statistics: Statistics, share: float) -> list[SelectionPlan]:
    """Plans of at most a share: one threshold, pairs of fixed numbers, and one of each.

    Args:
        statistics: gates of a text, from `routing_statistics`.
        share: of the hidden parameters, in the mean over tokens.
    """
    if share < statistics.least_share:
        return []
    one_threshold = thresholds(statistics, alike(statistics), share)
    return [one_threshold, *THRESHOLDS.uniform(statistics, share)]


def best_uniform(statistics: Statistics, share: float, measure: Measure) -> Found | None:
    """The uniform plan of at most a share with the least loss; None if there is none."""
    found = [Found(plan, measure(plan)) for plan in uniform_plans(statistics, share)]
    return min(found, key=lambda each: each.result.loss, default=None)


def uniform_numbers(statistics: Statistics, share: float) -> list[SelectionPlan]:
    """For each number of attention experts, the most feed-forward experts that fit the share."""
    kinds = [statistics.of_kind(kind).layers.values() for kind in get_args(Kind)]
    most, most_heads = (min((r.n_experts for r in kind), default=1) for kind in kinds)
    cost, cost_heads = (sum(r.per_expert for r in kind) for kind in kinds)
    room = share * statistics.hidden - statistics.always
    plans = []
    for heads in range(1, most_heads + 1):
        rest = room - heads * cost_heads + 0.5  # half a parameter, against rounding
        if rest < cost:
            break
        number = min(int(rest // cost), most) if cost else most
        plans.append(SelectionPlan(experts=TopK(number), attention=TopK(heads)))
    return plans


def uniform_mixed(statistics: Statistics, share: float) -> list[SelectionPlan]:
    """For each number of attention experts, the threshold of feed-forward experts that fits.

    Args:
        statistics: gates of a text, from `routing_statistics`.
        share: of the hidden parameters, in the mean over tokens.
    """
    experts, attention = statistics.of_kind("experts"), statistics.of_kind("attention").layers
    if not experts.layers:
        return []
    plans = []
    for heads in range(1, min((r.n_experts for r in attention.values()), default=0) + 1):
        always = statistics.always + heads * sum(r.per_expert for r in attention.values())
        others = experts._replace(always=always)
        if share >= others.least_share:
            plan = thresholds(others, alike(others), share)
            plans.append(replace(plan, attention=TopK(heads)))
    return plans


THRESHOLDS = PlanFamily(
    thresholds,
    # One threshold for all is not among them: a search starts there.
    lambda statistics, share: uniform_numbers(statistics, share) + uniform_mixed(statistics, share),
)
FIXED_NUMBERS = PlanFamily(fixed_numbers, uniform_numbers)

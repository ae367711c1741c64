"""The best plans that treat all layers alike, to compare others with."""

from lightning_dsmoe.analysis.evaluation import Found, Measure
from lightning_dsmoe.analysis.routing_statistics import Statistics
from lightning_dsmoe.analysis.solvers import alike, thresholds
from lightning_dsmoe.routing import SelectionPlan, TopK


def uniform_plans(statistics: Statistics, share: float) -> list[SelectionPlan]:
    """Plans of at most a share: one threshold for all routers, and pairs of fixed numbers.

    Args:
        statistics: what the routers say of a text.
        share: of the hidden parameters, in the mean over tokens.
    """
    if share < statistics.least_share:
        return []
    one_threshold = thresholds(statistics, alike(statistics), share)
    return [one_threshold, *uniform_numbers(statistics, share)]


def best_uniform(statistics: Statistics, share: float, measure: Measure) -> Found | None:
    """The uniform plan of at most a share with the least loss; None if there is none."""
    found = [Found(plan, measure(plan)) for plan in uniform_plans(statistics, share)]
    return min(found, key=lambda each: each.result.loss, default=None)


def uniform_numbers(statistics: Statistics, share: float) -> list[SelectionPlan]:
    """For each number of attention experts the most feed-forward experts that fit."""
    layers = len(statistics.experts)
    kinds = [
        [r for r in routers if r is not None]
        for routers in (statistics.experts, statistics.attention)
    ]
    most, most_heads = (min((r.n_experts for r in kind), default=1) for kind in kinds)
    cost, cost_heads = (sum(r.per_expert for r in kind) for kind in kinds)
    room = share * statistics.hidden - statistics.always
    plans = []
    for heads in range(1, most_heads + 1):
        left = room - heads * cost_heads + 0.5
        if left < cost:
            break
        number = min(int(left // cost), most) if cost else most
        plans.append(SelectionPlan.uniform(layers, experts=TopK(number), attention=TopK(heads)))
    return plans

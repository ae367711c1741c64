"""The best plans that treat all layers alike, to compare others with."""

from lightning_dsmoe.analysis.plan_search import Found, Measure
from lightning_dsmoe.analysis.routing_statistics import Statistics
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK

_HALVINGS = 40


def uniform_plans(statistics: Statistics, share: float) -> list[SelectionPlan]:
    """Plans of at most a share: one threshold for all routers, and pairs of fixed numbers.

    Args:
        statistics: what the routers say of a text.
        share: of the hidden parameters, in the mean over tokens.
    """
    return [
        *_threshold(statistics, share),
        *_fixed_numbers(statistics, share),
    ]


def best_uniform(statistics: Statistics, share: float, measure: Measure) -> Found | None:
    """The uniform plan of at most a share with the least loss; None if there is none."""
    found = [Found(plan, measure(plan)) for plan in uniform_plans(statistics, share)]
    return min(found, key=lambda each: each.result.loss, default=None)


def _threshold(statistics: Statistics, share: float) -> list[SelectionPlan]:
    layers = len(statistics.experts)
    routers = [r for r in statistics.experts + statistics.attention if r is not None]
    least = min((r.n_experts for r in routers), default=1)
    low, high = 0.0, (1 - 2**-20) * least
    if statistics.share([high] * layers, [high] * layers) > share:
        return []
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if statistics.share([middle] * layers, [middle] * layers) > share:
            low = middle
        else:
            high = middle
    return [SelectionPlan.uniform(layers, experts=Threshold(high), attention=Threshold(high))]


def _fixed_numbers(statistics: Statistics, share: float) -> list[SelectionPlan]:
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
        number = int((room - heads * cost_heads + 0.5) // cost) if cost else most
        if number >= 1:
            plans.append(
                SelectionPlan.uniform(
                    layers, experts=TopK(min(number, most)), attention=TopK(heads)
                )
            )
    return plans

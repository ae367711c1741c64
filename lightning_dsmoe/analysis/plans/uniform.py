"""The best plans that treat all layers alike, to compare others with."""

from lightning_dsmoe.analysis.evaluation import Found, Measure
from lightning_dsmoe.analysis.plans.routing_statistics import Statistics
from lightning_dsmoe.analysis.plans.solvers import alike, thresholds
from lightning_dsmoe.routing import SelectionPlan, TopK


def uniform_plans(statistics: Statistics, share: float) -> list[SelectionPlan]:
    """Plans of at most a share: one threshold, pairs of fixed numbers, and one of each.

    Args:
        statistics: what the routers say of a text.
        share: of the hidden parameters, in the mean over tokens.
    """
    if share < statistics.least_share:
        return []
    one_threshold = thresholds(statistics, alike(statistics), share)
    numbers, mixed = uniform_numbers(statistics, share), uniform_mixed(statistics, share)
    return [one_threshold, *numbers, *mixed]


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


def uniform_mixed(statistics: Statistics, share: float) -> list[SelectionPlan]:
    """For each number of attention experts the threshold of feed-forward experts that fits."""
    if not any(statistics.experts):
        return []
    most = min((router.n_experts for router in statistics.attention if router), default=0)
    plans = [_threshold_beside(heads, statistics, share) for heads in range(1, most + 1)]
    return [plan for plan in plans if plan is not None]


def _threshold_beside(heads: int, statistics: Statistics, share: float) -> SelectionPlan | None:
    """The threshold of feed-forward experts beside a number of attention experts.

    Args:
        heads: attention experts of each layer.
        statistics: what the routers say of a text.
        share: of the hidden parameters, in the mean over tokens.

    Returns:
        The plan of that share; None if one feed-forward expert in each layer is more.
    """
    layers = len(statistics.attention)
    fixed = heads * sum(router.per_expert for router in statistics.attention if router)
    others = statistics._replace(attention=[None] * layers, always=statistics.always + fixed)
    if share < others.least_share:
        return None
    plan = thresholds(others, alike(others), share)
    return SelectionPlan(plan.experts, (TopK(heads),) * layers)

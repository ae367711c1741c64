"""Plans for a budget, found on a text."""

from typing import Any

import pytest
import torch

from lightning_dsmoe.analysis import HeldOut, PlanResult, evaluate_plan
from lightning_dsmoe.analysis.plan_search import (
    fixed_numbers,
    search,
    sensitivities,
    thresholds,
)
from lightning_dsmoe.analysis.routing_statistics import (
    RouterStatistics,
    Statistics,
    routing_statistics,
)
from lightning_dsmoe.analysis.uniform import best_uniform, uniform_plans
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.metrics import ParameterCounts
from lightning_dsmoe.routing import AllExperts, SelectionPlan, Threshold, TopK

EVEN = (1.0,) * 4


@pytest.fixture
def statistics(model: SparseModel, text: HeldOut, counts: ParameterCounts) -> Statistics:
    return routing_statistics(model, text, counts)


@pytest.fixture
def measure(model: SparseModel, text: HeldOut, counts: ParameterCounts) -> Any:
    return lambda plan: evaluate_plan(model, plan, text, counts)


def test_statistics_tell_what_a_threshold_keeps_and_drops() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04], [0.34, 0.33, 0.33]])
    router = RouterStatistics(probs, per_expert=10)
    assert router.kept(0.7).item() == pytest.approx((2 + 1 + 3) / 3)
    assert router.kept(3.0).item() == 1
    assert router.dropped_mass(0.7).item() == pytest.approx((0.2 + 0.1) / 3)
    assert router.dropped_mass(3.0).item() == pytest.approx((0.5 + 0.1 + 0.66) / 3)
    whole = Statistics([router], [None], always=5, hidden=35)
    assert whole.share([0.7], [0.0]) == pytest.approx((5 + 20) / 35)


def test_statistics_are_of_counted_tokens(statistics: Statistics, text: HeldOut) -> None:
    for router in statistics.experts + statistics.attention:
        assert router is not None
        assert len(router.probs_XN) == text.n_tokens
        assert (router.probs_XN.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("budget", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("solve", [thresholds, fixed_numbers])
def test_plans_keep_to_the_budget_and_use_it(
    solve: Any, budget: float, statistics: Statistics, measure: Any
) -> None:
    plan = solve(statistics, EVEN, budget)
    share = measure(plan).share
    largest = max(r.per_expert for r in statistics.experts + statistics.attention if r)
    step = largest / statistics.hidden
    if solve is fixed_numbers:
        assert budget - step < share <= budget + 1e-6
    else:  # routing shifts a little when experts do not run
        assert abs(share - budget) < 0.05


def test_a_sensitive_router_keeps_more(statistics: Statistics) -> None:
    for solve in (thresholds, fixed_numbers):
        even = solve(statistics, EVEN, 0.7)
        tilted = solve(statistics, (8.0, 1.0, 1.0, 1.0), 0.7)
        if solve is thresholds:
            assert tilted.experts[0].eps < even.experts[0].eps
            assert tilted.experts[1].eps > even.experts[1].eps
        else:
            assert tilted.experts[0].k > even.experts[0].k


def test_sensitivity_is_loss_for_dropped_mass(statistics: Statistics, measure: Any) -> None:
    plan = SelectionPlan.uniform(2, experts=Threshold(0.9), attention=Threshold(0.9))
    found = sensitivities(statistics, plan, measure)
    alone = SelectionPlan((AllExperts(), Threshold(0.9)), (AllExperts(), AllExperts()))
    increase = measure(alone).loss - measure(SelectionPlan.uniform(2)).loss
    mass = statistics.experts[1].dropped_mass(0.9).item()
    assert increase > 0
    assert found[1] == pytest.approx(increase / mass)


def test_the_search_is_no_worse_than_where_it_starts(statistics: Statistics, measure: Any) -> None:
    for solve in (thresholds, fixed_numbers):
        found = search(statistics, 0.6, solve, measure)
        assert found.result == measure(found.plan)._replace(
            tokens_per_second=found.result.tokens_per_second
        )
        assert found.result.loss <= measure(solve(statistics, EVEN, 0.6)).loss


@pytest.mark.parametrize("budget", [-1.0, 0.1, 1.01, float("nan")])
def test_impossible_budgets(budget: float, statistics: Statistics) -> None:
    def measure(plan: SelectionPlan) -> PlanResult:
        raise AssertionError("a plan was tried")

    with pytest.raises(ValueError, match="cannot be met: one expert in each layer is 0\\."):
        search(statistics, budget, thresholds, measure)


def test_uniform_plans_of_a_share(statistics: Statistics, measure: Any) -> None:
    plans = uniform_plans(statistics, 0.7)
    assert [type(plan.experts[0]) for plan in plans] == [Threshold, TopK, TopK, TopK]
    for plan in plans:
        assert len(set(plan.experts)) == len(set(plan.attention)) == 1
    for plan in plans[1:]:
        assert measure(plan).share <= 0.7
    best = best_uniform(statistics, 0.7, measure)
    assert best is not None
    assert best.result.loss == min(measure(plan).loss for plan in plans)
    assert best_uniform(statistics, 0.1, measure) is None

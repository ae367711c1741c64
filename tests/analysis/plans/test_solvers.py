"""Plans of a share, made of what routers say of a text."""

from typing import Any

import pytest
import torch

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.plans.routing_statistics import RouterStatistics, Statistics
from lightning_dsmoe.analysis.plans.solvers import (
    alike,
    best_uniform,
    fixed_numbers,
    thresholds,
    uniform_numbers,
    uniform_plans,
)
from lightning_dsmoe.routing import AllExperts, SelectionPlan, Threshold, TopK

from ..conftest import share_of

EVEN = (1.0,) * 4


def test_statistics_tell_what_a_threshold_keeps_and_drops() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04], [0.34, 0.33, 0.33]])
    router = RouterStatistics(probs, per_expert=10)
    assert router.running(0.7).item() == pytest.approx((2 + 1 + 3) / 3)
    assert router.running(3.0).item() == 1
    assert router.dropped_mass(0.7).item() == pytest.approx((0.2 + 0.1) / 3)
    assert router.dropped_mass(3.0).item() == pytest.approx((0.5 + 0.1 + 0.66) / 3)
    whole = Statistics([router], [None], always=5, hidden=35)
    assert whole.share([0.7, 0.0]) == pytest.approx((5 + 20) / 35)


def test_statistics_are_of_counted_tokens(statistics: Statistics, text: HeldOut) -> None:
    for router in statistics.experts + statistics.attention:
        assert router is not None
        assert len(router.probs_NE) == text.n_tokens
        assert (router.probs_NE.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("budget", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("solve", [thresholds, fixed_numbers])
def test_plans_keep_to_the_budget_and_use_it(
    solve: Any, budget: float, statistics: Statistics, measure: Any
) -> None:
    plan = solve(statistics, EVEN, budget)
    share = measure(plan).active_share_mean
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


def test_one_sensitivity_makes_all_thresholds_equal(statistics: Statistics) -> None:
    plan = thresholds(statistics, alike(statistics), 0.7)
    eps = [selection.eps for selection in plan.experts + plan.attention]
    assert eps == pytest.approx([eps[0]] * 4)


@pytest.mark.parametrize("without", ["experts", "attention"])
def test_uniform_plans_keep_to_the_share_where_one_kind_has_no_mixtures(without: str) -> None:
    router = RouterStatistics(torch.full((2, 4), 0.25), per_expert=10)
    kinds = {"experts": [router, router], "attention": [router, router], without: [None, None]}
    statistics = Statistics(**kinds, always=20, hidden=100)
    found = {
        getattr(plan, kind)[0]
        for plan in uniform_numbers(statistics, 0.65)
        for kind in kinds
        if kind != without
    }
    assert max(selection.k for selection in found) == 2


@pytest.mark.parametrize("per_expert", [1, 10**9])
def test_thresholds_use_the_budget_whatever_the_size(per_expert: int) -> None:
    probs = torch.rand(200, 8).softmax(-1).sort(dim=-1, descending=True).values
    router = RouterStatistics(probs, per_expert)
    statistics = Statistics([router], [router], always=0, hidden=16 * per_expert)
    for sensitivity in ((1.0, 1.0), (1e-4, 1e-4)):
        plan = thresholds(statistics, sensitivity, 0.95)
        assert 0.94 < share_of(statistics, plan) <= 0.95


def test_uniform_plans_of_a_share(statistics: Statistics, measure: Any) -> None:
    plans = uniform_plans(statistics, 0.7)
    kinds = [(type(plan.experts[0]), type(plan.attention[0])) for plan in plans]
    assert kinds == [(Threshold, Threshold), *[(TopK, TopK)] * 3, *[(Threshold, TopK)] * 3]
    for plan in plans:
        assert len(set(plan.experts)) == len(set(plan.attention)) == 1
    for plan in plans[1:4]:
        assert measure(plan).active_share_mean <= 0.7
    for plan in plans[4:]:
        heads = plan.attention[0].k * sum(router.per_expert for router in statistics.attention)
        rest = statistics._replace(attention=[None, None], always=statistics.always + heads)
        alone = SelectionPlan(plan.experts, (AllExperts(), AllExperts()))
        assert 0.65 < share_of(rest, alone) <= 0.7
    best = best_uniform(statistics, 0.7, measure)
    assert best is not None
    assert best.result.loss == min(measure(plan).loss for plan in plans)
    assert best_uniform(statistics, 0.1, measure) is None

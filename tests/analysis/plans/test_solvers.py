"""Plans of a share, made of what routers say of a text."""

from typing import Any

import pytest
import torch

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.plans.routing_statistics import RouterStatistics, Statistics
from lightning_dsmoe.analysis.plans.solvers import (
    alike,
    best_uniform,
    even,
    fixed_numbers,
    thresholds,
    uniform_numbers,
    uniform_plans,
)
from lightning_dsmoe.routing import Threshold, TopK
from lightning_dsmoe.routing.routing import Kind

from ..conftest import in_block, share_of


def test_statistics_tell_what_a_threshold_keeps_and_drops() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04], [0.34, 0.33, 0.33]])
    router = RouterStatistics("experts", probs, per_expert=10)
    assert router.running(0.7).item() == pytest.approx((2 + 1 + 3) / 3)
    assert router.running(3.0).item() == 1
    assert router.dropped_mass(0.7).item() == pytest.approx((0.2 + 0.1) / 3)
    assert router.dropped_mass(3.0).item() == pytest.approx((0.5 + 0.1 + 0.66) / 3)
    whole = Statistics({"mlp": router}, always=5, hidden=35)
    assert whole.share({"mlp": 0.7}) == pytest.approx((5 + 20) / 35)


def test_statistics_are_of_counted_tokens(statistics: Statistics, text: HeldOut) -> None:
    kinds = [router.kind for router in statistics.layers.values()]
    assert kinds == ["experts"] * 2 + ["attention"] * 2
    for router in statistics.layers.values():
        assert len(router.probs_NE) == text.n_tokens
        assert (router.probs_NE.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("budget", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("solve", [thresholds, fixed_numbers])
def test_plans_keep_to_the_budget_and_use_it(
    solve: Any, budget: float, statistics: Statistics, measure: Any
) -> None:
    plan = solve(statistics, even(statistics), budget)
    share = measure(plan).active_share_mean
    largest = max(router.per_expert for router in statistics.layers.values())
    step = largest / statistics.hidden
    if solve is fixed_numbers:
        assert budget - step < share <= budget + 1e-6
    else:  # routing shifts a little when experts do not run
        assert abs(share - budget) < 0.05


def test_a_sensitive_router_keeps_more(statistics: Statistics) -> None:
    for solve in (thresholds, fixed_numbers):
        sensitivity = {**even(statistics), "blocks.0.feed_forward": 8.0}
        plans = solve(statistics, even(statistics), 0.7), solve(statistics, sensitivity, 0.7)
        before, tilted = (in_block(plan, 0, "experts") for plan in plans)
        others_before, others = (in_block(plan, 1, "experts") for plan in plans)
        if solve is thresholds:
            assert tilted.eps < before.eps
            assert others.eps > others_before.eps
        else:
            assert tilted.k > before.k


def test_one_sensitivity_makes_all_thresholds_equal(statistics: Statistics) -> None:
    plan = thresholds(statistics, alike(statistics), 0.7)
    eps = [selection.eps for selection in plan.selections(statistics.layers).values()]
    assert not plan.layers  # so the plan is short
    assert eps == pytest.approx([eps[0]] * 4)


@pytest.mark.parametrize("without", ["experts", "attention"])
def test_uniform_plans_keep_to_the_share_where_one_kind_has_no_mixtures(without: str) -> None:
    kind: Kind = "attention" if without == "experts" else "experts"
    router = RouterStatistics(kind, torch.full((2, 4), 0.25), per_expert=10)
    statistics = Statistics({"one": router, "other": router}, always=20, hidden=100)
    found = {getattr(plan, kind) for plan in uniform_numbers(statistics, 0.65)}
    assert max(selection.k for selection in found) == 2


@pytest.mark.parametrize("per_expert", [1, 10**9])
def test_thresholds_use_the_budget_whatever_the_size(per_expert: int) -> None:
    probs = torch.rand(200, 8).softmax(-1).sort(dim=-1, descending=True).values
    kinds: tuple[Kind, ...] = ("experts", "attention")
    routers = {kind: RouterStatistics(kind, probs, per_expert) for kind in kinds}
    statistics = Statistics(routers, always=0, hidden=16 * per_expert)
    for sensitivity in (1.0, 1e-4):
        plan = thresholds(statistics, dict.fromkeys(routers, sensitivity), 0.95)
        assert 0.94 < share_of(statistics, plan) <= 0.95


def test_uniform_plans_of_a_share(statistics: Statistics, measure: Any) -> None:
    plans = uniform_plans(statistics, 0.7)
    kinds = [(type(plan.experts), type(plan.attention)) for plan in plans]
    assert kinds == [(Threshold, Threshold), *[(TopK, TopK)] * 3, *[(Threshold, TopK)] * 3]
    for plan in plans:
        assert not plan.layers
    for plan in plans[1:4]:
        assert measure(plan).active_share_mean <= 0.7
    for plan in plans[4:]:
        attention = statistics.of_kind("attention").layers.values()
        assert isinstance(plan.attention, TopK)
        heads = plan.attention.k * sum(router.per_expert for router in attention)
        rest = statistics.of_kind("experts")._replace(always=statistics.always + heads)
        assert 0.65 < share_of(rest, plan) <= 0.7
    best = best_uniform(statistics, 0.7, measure)
    assert best is not None
    assert best.result.loss == min(measure(plan).loss for plan in plans)
    assert best_uniform(statistics, 0.1, measure) is None

"""Plans for a budget, found on a text."""

from collections.abc import Callable
from statistics import stdev
from typing import Any

import pytest
import torch

from lightning_dsmoe.analysis import HeldOut, PlanResult, evaluate_plan
from lightning_dsmoe.analysis.divergence import Diverge
from lightning_dsmoe.analysis.plan_search import search, sensitivities, sparsest
from lightning_dsmoe.analysis.routing_statistics import (
    RouterStatistics,
    Statistics,
    routing_statistics,
)
from lightning_dsmoe.analysis.solvers import alike, fixed_numbers, thresholds
from lightning_dsmoe.analysis.uniform import (
    best_uniform,
    uniform_mixed,
    uniform_numbers,
    uniform_plans,
)
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


def test_one_sensitivity_makes_all_thresholds_equal(statistics: Statistics) -> None:
    plan = thresholds(statistics, alike(statistics), 0.7)
    eps = [selection.eps for selection in plan.experts + plan.attention]
    assert eps == pytest.approx([eps[0]] * 4)


@pytest.mark.parametrize(("solve", "budget"), [(thresholds, 0.55), (fixed_numbers, 0.7)])
def test_the_search_is_no_worse_than_where_it_starts(
    solve: Any, budget: float, statistics: Statistics, measure: Any
) -> None:
    found = search(statistics, budget, solve, measure)
    again = measure(found.plan)
    assert found.result == again._replace(tokens_per_second=found.result.tokens_per_second)
    starts = [
        solve(statistics, EVEN, budget),
        solve(statistics, alike(statistics), budget),
        *uniform_numbers(statistics, budget),
    ]
    assert not any(measure(plan).clearly_below(found.result) for plan in starts)
    if solve is thresholds:
        best = best_uniform(statistics, budget, measure)
        assert best is not None
        assert not best.result.clearly_below(found.result)


def made_up(loss: Callable[[SelectionPlan], float]) -> Callable[[SelectionPlan], PlanResult]:
    def measure(plan: SelectionPlan) -> PlanResult:
        found = loss(plan)
        return PlanResult(found, 0.0, 0.0, 0.0, 1.0, (found,))

    return measure


def test_the_search_gives_more_to_the_router_that_counts(statistics: Statistics) -> None:
    """The loss is what the last router of attention drops."""
    router = statistics.attention[1]
    assert router is not None

    def loss(plan: SelectionPlan) -> float:
        last = plan.attention[1]
        return router.dropped_mass(last.eps).item() if isinstance(last, Threshold) else 1.0

    start = thresholds(statistics, EVEN, 0.6).attention[1]
    found = search(statistics, 0.6, thresholds, made_up(loss)).plan.attention[1]
    assert found.eps < start.eps / 2


def result(*window_losses: float) -> PlanResult:
    return PlanResult(sum(window_losses) / 8, 0.0, 0.0, 0.0, 1.0, window_losses)


def test_a_loss_is_clearly_lower_if_chance_does_not_explain_it() -> None:
    before = result(3.0, 5.0, 4.0, 6.0)
    assert result(2.9, 4.9, 3.9, 5.9).clearly_below(before)
    assert not before.clearly_below(result(2.9, 4.9, 3.9, 5.9))
    assert not before.clearly_below(before)
    # Gains of 1, -0.9, 0.5 and 0.4 sum to 1; their standard deviation is 0.81, twice that 1.62.
    assert not result(2.0, 5.9, 3.5, 5.6).clearly_below(before)
    # Gains of 1, -0.2, 0.9 and 0.1 sum to 1.8; their standard deviation is 0.59, twice that 1.18.
    assert result(2.0, 5.2, 3.1, 5.9).clearly_below(before)
    gain = result(2.0, 5.2, 3.1, 5.9).gain_over(before)
    assert gain == pytest.approx((1.8, 2 * stdev([1.0, -0.2, 0.9, 0.1])))
    assert result(2.9).clearly_below(result(3.0))
    assert result(2.9).gain_over(result(3.0)) == pytest.approx((0.1, 0.0))


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_search_moves_on_for_clear_gains_alone(spread: float, statistics: Statistics) -> None:
    """Half of the text gains by what the other half loses, and a little more."""
    router = statistics.attention[1]
    assert router is not None

    def measure(plan: SelectionPlan) -> PlanResult:
        last = plan.attention[1]
        dropped = router.dropped_mass(last.eps).item() if isinstance(last, Threshold) else 1.0
        return result(1 + (0.01 + spread) * dropped, 1 + (0.01 - spread) * dropped)

    found = search(statistics, 0.6, thresholds, measure).plan
    starts = [thresholds(statistics, sensitivity, 0.6) for sensitivity in (EVEN, alike(statistics))]
    moved = found.attention[1].eps < min(plan.attention[1].eps for plan in starts) / 2
    assert moved == (spread == 0)


@pytest.mark.parametrize("finished", [False, True])
def test_divergence_guides_the_search_unless_a_sparse_plan_has_the_lower_loss(
    finished: bool, statistics: Statistics
) -> None:
    """The loss counts what the last router of attention drops, the divergence the first one."""

    def dropped(plan: SelectionPlan, layer: int) -> float:
        router, selection = statistics.attention[layer], plan.attention[layer]
        if not (router and isinstance(selection, Threshold)):
            return float(isinstance(selection, TopK))
        return router.dropped_mass(selection.eps).item()

    def loss(plan: SelectionPlan) -> float:
        return 9.0 if finished and plan == SelectionPlan.uniform(2) else dropped(plan, 1)

    by_loss = search(statistics, 0.6, thresholds, made_up(loss))
    by_divergence = search(statistics, 0.6, thresholds, made_up(lambda plan: dropped(plan, 0)))
    assert by_loss.plan != by_divergence.plan
    made: list[str] = []

    def make_diverge() -> Diverge:
        made.append("once")
        return lambda plan: (dropped(plan, 0),)

    found = search(statistics, 0.6, thresholds, made_up(loss), make_diverge)
    assert made == ([] if finished else ["once"])
    assert found.plan == (by_loss if finished else by_divergence).plan
    assert found.result.loss == loss(found.plan)


def test_the_search_takes_the_uniform_plan_if_nothing_beats_it(statistics: Statistics) -> None:
    best = uniform_numbers(statistics, 0.7)[1]
    found = search(statistics, 0.7, thresholds, made_up(lambda plan: float(plan != best)))
    assert found.plan == best


def test_the_last_uniform_plan_that_is_clearly_better_is_taken(statistics: Statistics) -> None:
    by_chance, better, best = uniform_mixed(statistics, 0.9)[:3]
    results = {
        by_chance: result(0.0, 9.0, 0.0, 5.0),
        better: result(2.9, 4.9, 3.9, 5.9),
        best: result(2.8, 4.8, 3.8, 5.8),
    }
    usual = result(3.0, 5.0, 4.0, 6.0)
    assert results[by_chance].loss < results[best].loss
    found = search(statistics, 0.9, thresholds, lambda plan: results.get(plan, usual))
    assert found.plan == best


def test_a_uniform_plan_can_win_by_divergence(statistics: Statistics) -> None:
    best = uniform_numbers(statistics, 0.7)[1]
    found = search(
        statistics,
        0.7,
        thresholds,
        made_up(lambda plan: 1.0),
        lambda: lambda plan: (float(plan != best),),
    )
    assert found.plan == best
    assert found.result.loss == 1


def test_numbers_beside_a_threshold_are_tried_unless_numbers_are_wanted(
    statistics: Statistics,
) -> None:
    best = uniform_mixed(statistics, 0.7)[1]
    measure = made_up(lambda plan: float(plan != best))
    assert search(statistics, 0.7, thresholds, measure).plan == best
    numbers = search(statistics, 0.7, fixed_numbers, measure).plan
    assert {type(selection) for selection in numbers.experts + numbers.attention} == {TopK}


@pytest.mark.parametrize("guided", [False, True])
def test_no_plan_is_measured_twice(guided: bool, statistics: Statistics, measure: Any) -> None:
    seen: list[SelectionPlan] = []

    def counted(plan: SelectionPlan) -> PlanResult:
        seen.append(plan)
        return measure(plan)

    make_diverge = (lambda: lambda plan: measure(plan).window_losses) if guided else None
    search(statistics, 0.7, thresholds, counted, make_diverge)
    assert len(seen) == len(set(seen)) >= 2
    seen.clear()
    sparsest(statistics, 0.1, thresholds, counted)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("solve", [thresholds, fixed_numbers])
def test_the_sparsest_plan_keeps_to_its_loss(
    solve: Any, statistics: Statistics, measure: Any
) -> None:
    found = sparsest(statistics, 0.02, solve, measure)
    most = measure(SelectionPlan.uniform(2)).loss * 1.02
    assert measure(found.plan).loss == pytest.approx(found.result.loss)
    assert found.result.loss <= most
    assert found.result.share < 0.8


def test_the_sparsest_plan_is_a_uniform_one_if_that_is_better(statistics: Statistics) -> None:
    """Nothing is lost down to 0.7 under thresholds, where one plan of numbers is better still."""

    def loss(plan: SelectionPlan) -> float:
        if isinstance(plan.attention[0], TopK):
            return float(plan != best)
        return 1 + max(0.0, 0.7 - share_of(statistics, plan))

    best = uniform_numbers(statistics, 0.72)[1]
    found = sparsest(statistics, 0.0, thresholds, made_up(loss))
    assert found.plan == best
    assert found.result.loss == 0


def share_of(statistics: Statistics, plan: SelectionPlan) -> float:
    layers = [
        [0.0 if isinstance(selection, AllExperts) else selection.eps for selection in kind]
        for kind in (plan.experts, plan.attention)
    ]
    return statistics.share(*layers)


@pytest.mark.parametrize(("increase", "expected"), [(0.0, 0.8), (0.1, 0.7), (0.25, 0.55)])
def test_the_share_is_the_least_that_the_loss_allows(
    increase: float, expected: float, statistics: Statistics
) -> None:
    def loss(plan: SelectionPlan) -> float:
        if isinstance(plan.attention[0], TopK):
            return 2.0
        return 1 + max(0.0, 0.8 - share_of(statistics, plan))

    found = sparsest(statistics, increase, thresholds, made_up(loss))
    assert found.result.loss <= 1 + increase
    assert expected <= share_of(statistics, found.plan) < expected + 0.02


def test_what_costs_nothing_is_left_out(statistics: Statistics) -> None:
    found = sparsest(statistics, 0.0, thresholds, made_up(lambda plan: 1.0))
    assert share_of(statistics, found.plan) < statistics.least_share + 0.02


def test_where_every_expert_counts_all_run(statistics: Statistics) -> None:
    dense = SelectionPlan.uniform(2)
    found = sparsest(statistics, 0.1, thresholds, made_up(lambda plan: 1.0 + (plan != dense)))
    assert found.plan == dense


def test_a_search_is_short_where_nothing_helps(statistics: Statistics) -> None:
    tried: list[SelectionPlan] = []

    def loss(plan: SelectionPlan) -> float:
        tried.append(plan)
        return 1.0 + len(tried)  # nothing ever helps

    sparsest(statistics, 0.1, thresholds, made_up(loss))
    assert tried.count(SelectionPlan.uniform(2)) == 1
    assert len(tried) < 40


@pytest.mark.parametrize("budget", [-1.0, 0.1, 1.01, float("nan")])
def test_impossible_budgets(budget: float, statistics: Statistics) -> None:
    def measure(plan: SelectionPlan) -> PlanResult:
        raise AssertionError("a plan was tried")

    with pytest.raises(ValueError, match="cannot be met: one expert in each layer is 0\\."):
        search(statistics, budget, thresholds, measure)


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
        assert measure(plan).share <= 0.7
    for plan in plans[4:]:
        heads = plan.attention[0].k * sum(router.per_expert for router in statistics.attention)
        rest = statistics._replace(attention=[None, None], always=statistics.always + heads)
        alone = SelectionPlan(plan.experts, (AllExperts(), AllExperts()))
        assert 0.65 < share_of(rest, alone) <= 0.7
    best = best_uniform(statistics, 0.7, measure)
    assert best is not None
    assert best.result.loss == min(measure(plan).loss for plan in plans)
    assert best_uniform(statistics, 0.1, measure) is None

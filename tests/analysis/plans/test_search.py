"""Plans for a budget, found on a text."""

from collections.abc import Callable
from statistics import stdev
from typing import Any

import pytest

from lightning_dsmoe.analysis import PlanResult
from lightning_dsmoe.analysis.plans.divergence import Diverge
from lightning_dsmoe.analysis.plans.routing_statistics import Statistics
from lightning_dsmoe.analysis.plans.search import PlanSearch, Score, sensitivities
from lightning_dsmoe.analysis.plans.solvers import (
    FIXED_NUMBERS,
    THRESHOLDS,
    PlanFamily,
    alike,
    best_uniform,
    even,
    thresholds,
    uniform_mixed,
    uniform_numbers,
)
from lightning_dsmoe.routing import AllExperts, SelectionPlan, Threshold, TopK

from ..conftest import in_block, share_of

LAST = "blocks.1.attention"
FIRST = "blocks.0.attention"


def test_sensitivity_is_loss_for_dropped_mass(statistics: Statistics, measure: Any) -> None:
    plan = SelectionPlan(experts=Threshold(0.9), attention=Threshold(0.9))

    def score(plan: SelectionPlan) -> Score:
        return Score(measure(plan).loss, ())

    found = sensitivities(statistics, plan, score)
    alone = SelectionPlan.of_blocks((AllExperts(), Threshold(0.9)), (AllExperts(), AllExperts()))
    increase = measure(alone).loss - measure(SelectionPlan()).loss
    mass = statistics.layers["blocks.1.feed_forward"].dropped_mass(0.9).item()
    assert increase > 0
    assert found["blocks.1.feed_forward"] == pytest.approx(increase / mass)


@pytest.mark.parametrize(("family", "budget"), [(THRESHOLDS, 0.55), (FIXED_NUMBERS, 0.7)])
def test_the_search_is_no_worse_than_where_it_starts(
    family: PlanFamily, budget: float, statistics: Statistics, measure: Any
) -> None:
    found = PlanSearch(statistics, measure, family).within(budget)
    again = measure(found.plan)
    assert found.result == again._replace(tokens_per_second=found.result.tokens_per_second)
    starts = [
        family.solve(statistics, even(statistics), budget),
        family.solve(statistics, alike(statistics), budget),
        *uniform_numbers(statistics, budget),
    ]
    assert not any(measure(plan).clearly_below(found.result) for plan in starts)
    if family is THRESHOLDS:
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
    router = statistics.layers[LAST]

    def loss(plan: SelectionPlan) -> float:
        last = in_block(plan, 1, "attention")
        return router.dropped_mass(last.eps).item() if isinstance(last, Threshold) else 1.0

    start = in_block(thresholds(statistics, even(statistics), 0.6), 1, "attention")
    plan = PlanSearch(statistics, made_up(loss)).within(0.6).plan
    found = in_block(plan, 1, "attention")
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
    router = statistics.layers[LAST]

    def measure(plan: SelectionPlan) -> PlanResult:
        last = in_block(plan, 1, "attention")
        dropped = router.dropped_mass(last.eps).item() if isinstance(last, Threshold) else 1.0
        return result(1 + (0.01 + spread) * dropped, 1 + (0.01 - spread) * dropped)

    found = PlanSearch(statistics, measure).within(0.6).plan
    starts = [thresholds(statistics, each(statistics), 0.6) for each in (even, alike)]
    eps = [in_block(plan, 1, "attention").eps for plan in starts]
    moved = in_block(found, 1, "attention").eps < min(eps) / 2
    assert moved == (spread == 0)


@pytest.mark.parametrize("finished", [False, True])
def test_divergence_guides_the_search_unless_a_sparse_plan_has_the_lower_loss(
    finished: bool, statistics: Statistics
) -> None:
    """The loss counts what the last router of attention drops, the divergence the first one."""

    def dropped(plan: SelectionPlan, layer: int) -> float:
        selection = in_block(plan, layer, "attention")
        if not isinstance(selection, Threshold):
            return float(isinstance(selection, TopK))
        return statistics.layers[(FIRST, LAST)[layer]].dropped_mass(selection.eps).item()

    def loss(plan: SelectionPlan) -> float:
        return 9.0 if finished and plan == SelectionPlan() else dropped(plan, 1)

    by_loss = PlanSearch(statistics, made_up(loss)).within(0.6)
    by_divergence = PlanSearch(statistics, made_up(lambda plan: dropped(plan, 0))).within(0.6)
    assert by_loss.plan != by_divergence.plan
    made: list[str] = []

    def make_diverge() -> Diverge:
        made.append("once")
        return lambda plan: (dropped(plan, 0),)

    found = PlanSearch(statistics, made_up(loss), make_divergence=make_diverge).within(0.6)
    assert made == ([] if finished else ["once"])
    assert found.plan == (by_loss if finished else by_divergence).plan
    assert found.result.loss == loss(found.plan)


def test_the_search_takes_the_uniform_plan_if_nothing_beats_it(statistics: Statistics) -> None:
    best = uniform_numbers(statistics, 0.7)[1]
    found = PlanSearch(statistics, made_up(lambda plan: float(plan != best))).within(0.7)
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
    found = PlanSearch(statistics, lambda plan: results.get(plan, usual)).within(0.9)
    assert found.plan == best


def test_a_uniform_plan_can_win_by_divergence(statistics: Statistics) -> None:
    best = uniform_numbers(statistics, 0.7)[1]
    found = PlanSearch(
        statistics,
        made_up(lambda plan: 1.0),
        make_divergence=lambda: lambda plan: (float(plan != best),),
    ).within(0.7)
    assert found.plan == best
    assert found.result.loss == 1


def test_numbers_beside_a_threshold_are_tried_unless_numbers_are_wanted(
    statistics: Statistics,
) -> None:
    best = uniform_mixed(statistics, 0.7)[1]
    measure = made_up(lambda plan: float(plan != best))
    assert PlanSearch(statistics, measure).within(0.7).plan == best
    numbers = PlanSearch(statistics, measure, FIXED_NUMBERS).within(0.7).plan
    selections = numbers.selections(statistics.layers).values()
    assert {type(selection) for selection in selections} == {TopK}


@pytest.mark.parametrize("guided", [False, True])
def test_no_plan_is_measured_twice(guided: bool, statistics: Statistics, measure: Any) -> None:
    seen: list[SelectionPlan] = []

    def counted(plan: SelectionPlan) -> PlanResult:
        seen.append(plan)
        return measure(plan)

    make_diverge = (lambda: lambda plan: measure(plan).window_losses) if guided else None
    PlanSearch(statistics, counted, make_divergence=make_diverge).within(0.7)
    assert len(seen) == len(set(seen)) >= 2
    seen.clear()
    PlanSearch(statistics, counted).sparsest(0.1)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("family", [THRESHOLDS, FIXED_NUMBERS])
def test_the_sparsest_plan_keeps_to_its_loss(
    family: PlanFamily, statistics: Statistics, measure: Any
) -> None:
    found = PlanSearch(statistics, measure, family).sparsest(0.02)
    most = measure(SelectionPlan()).loss * 1.02
    assert measure(found.plan).loss == pytest.approx(found.result.loss)
    assert found.result.loss <= most
    assert found.result.active_share_mean < 0.8


def test_the_sparsest_plan_is_a_uniform_one_if_that_is_better(statistics: Statistics) -> None:
    """Nothing is lost down to 0.7 under thresholds, where one plan of numbers is better still."""

    def loss(plan: SelectionPlan) -> float:
        if isinstance(plan.attention, TopK):
            return float(plan != best)
        return 1 + max(0.0, 0.7 - share_of(statistics, plan))

    best = uniform_numbers(statistics, 0.72)[1]
    found = PlanSearch(statistics, made_up(loss)).sparsest(0.0)
    assert found.plan == best
    assert found.result.loss == 0


@pytest.mark.parametrize(("increase", "expected"), [(0.0, 0.8), (0.1, 0.7), (0.25, 0.55)])
def test_the_share_is_the_least_that_the_loss_allows(
    increase: float, expected: float, statistics: Statistics
) -> None:
    def loss(plan: SelectionPlan) -> float:
        if isinstance(plan.attention, TopK):
            return 2.0
        return 1 + max(0.0, 0.8 - share_of(statistics, plan))

    found = PlanSearch(statistics, made_up(loss)).sparsest(increase)
    assert found.result.loss <= 1 + increase
    assert expected <= share_of(statistics, found.plan) < expected + 0.02


def test_what_costs_nothing_is_left_out(statistics: Statistics) -> None:
    found = PlanSearch(statistics, made_up(lambda plan: 1.0)).sparsest(0.0)
    assert share_of(statistics, found.plan) < statistics.least_share + 0.02


def test_where_every_expert_counts_all_run(statistics: Statistics) -> None:
    dense = SelectionPlan()
    found = PlanSearch(statistics, made_up(lambda plan: 1.0 + (plan != dense))).sparsest(0.1)
    assert found.plan == dense


def test_a_search_is_short_where_nothing_helps(statistics: Statistics) -> None:
    tried: list[SelectionPlan] = []

    def loss(plan: SelectionPlan) -> float:
        tried.append(plan)
        return 1.0 + len(tried)  # nothing ever helps

    PlanSearch(statistics, made_up(loss)).sparsest(0.1)
    assert tried.count(SelectionPlan()) == 1
    assert len(tried) < 40


@pytest.mark.parametrize("budget", [-1.0, 0.1, 1.01, float("nan")])
def test_impossible_budgets(budget: float, statistics: Statistics) -> None:
    def measure(plan: SelectionPlan) -> PlanResult:
        raise AssertionError("a plan was tried")

    with pytest.raises(ValueError, match="cannot be met: one expert in each layer is 0\\."):
        PlanSearch(statistics, measure).within(budget)

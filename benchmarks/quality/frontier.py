"""What a trained model loses when fewer of its experts run."""

from collections.abc import Callable, Iterable
from functools import cache
from statistics import mean
from typing import Any, get_args

from lightning_dsmoe import SelectionPlan, Threshold, TopK
from lightning_dsmoe.analysis import HeldOut, MeasuredText, PlanResult, evaluate_plan
from lightning_dsmoe.analysis.plans.routing_statistics import (
    RouterStatistics,
    Statistics,
    routing_statistics,
)
from lightning_dsmoe.analysis.plans.solvers import alike, thresholds, uniform_mixed, uniform_numbers
from lightning_dsmoe.commands.evaluation_setup import Trained
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.routing import routed_layers
from lightning_dsmoe.routing.routing import Kind

TRIES = 3
"""For a threshold that runs a share: what runs early decides how later layers route."""


def measure(
    trained: Trained, training_plan: SelectionPlan, shares: list[float], eps: float
) -> dict[str, Any]:
    """Losses with all experts, under the plan of training, and under plans of some shares.

    At each share there are one threshold for all routers; the best numbers of feed-forward and of
    attention experts, the same for all layers; once more a threshold, for the share that those
    numbers run; and, mixed, a threshold for the feed-forward experts beside the best number of
    attention experts. Thresholds and numbers are chosen on every fourth batch. The highest
    threshold leaves one expert of each router.

    Returns:
        `points`, each with its `rule`, the `budget` it was to keep to, `plan`, `share` and `loss`;
        and the experts `running` under the threshold `eps`, by kind.
    """
    model, counts, text = trained.model, trained.counts, trained.text
    part = every_fourth(text)

    @cache
    def on_part(plan: SelectionPlan) -> PlanResult:
        return evaluate_plan(model, plan, part, counts)

    @cache
    def on_text(plan: SelectionPlan) -> PlanResult:
        return evaluate_plan(model, plan, text, counts)

    points: list[dict[str, Any]] = []
    has_attention = any(layer.kind == "attention" for layer in routed_layers(model).values())

    def add(rule: str, budget: float, plan: SelectionPlan) -> None:
        loss, share, *_ = on_text(plan)
        name = _name(plan, attention=has_attention)
        points.append({"rule": rule, "budget": budget, "plan": name, "share": share, "loss": loss})

    def add_threshold(share: float) -> None:
        plan = threshold(statistics, share, lambda plan: on_part(plan).active_share_mean)
        if plan is not None:
            add("threshold", share, plan)

    dense = SelectionPlan()
    add("all", 1.0, dense)
    if training_plan != dense:
        add("as trained", 1.0, training_plan)
    if not counts.layers:
        return {"points": points, "running": {"experts": None, "attention": None}}
    statistics = routing_statistics(MeasuredText(model, part, counts))
    highest = SelectionPlan(experts=TopK(1), attention=TopK(1))
    add("threshold", statistics.least_share, highest)
    for share in shares:
        add_threshold(share)
        numbers = uniform_numbers(statistics, share)
        if numbers:
            add("top-k", share, min(numbers, key=lambda plan: on_part(plan).loss))
            add_threshold(points[-1]["share"])
        mixed = uniform_mixed(statistics, share)
        if mixed:
            add("mixed", share, min(mixed, key=lambda plan: on_part(plan).loss))
    kinds: tuple[Kind, ...] = get_args(Kind)
    return {
        "points": points,
        "running": {k: running(statistics.of_kind(k).layers.values(), eps) for k in kinds},
    }


def threshold(
    statistics: Statistics, share: float, measured: Callable[[SelectionPlan], float]
) -> SelectionPlan | None:
    """The threshold for all routers that comes closest to a share; None below the least one.

    Args:
        statistics: what the routers say with all experts running.
        share: of the hidden parameters.
        measured: tells the share that a plan runs.
    """
    found: list[tuple[float, SelectionPlan]] = []
    budget = share
    while len(found) < TRIES:
        if budget < statistics.least_share:
            break
        plan = thresholds(statistics, alike(statistics), budget)
        missing = share - measured(plan)
        found.append((abs(missing), plan))
        budget += missing
    return min(found, key=lambda each: each[0])[1] if found else None


def running(routers: Iterable[RouterStatistics], eps: float) -> dict[str, float] | None:
    """Experts that run under a threshold, means over the routers of a kind; None without one.

    Returns:
        The `share` n / N of the experts, and `beyond_one`, the share (n - 1) / (N - 1) of those
        that can be left out, as one always runs.
    """
    kept = [(r.running(eps).item(), r.n_experts) for r in routers]
    if not kept:
        return None
    return {
        "share": mean(n / of for n, of in kept),
        "beyond_one": mean((n - 1) / max(1, of - 1) for n, of in kept),
    }


def every_fourth(text: HeldOut) -> HeldOut:
    """Every fourth batch of a text, the first one among them."""
    batches = text.batches[::4]
    return HeldOut(batches, sum(int((labels != IGNORED).sum()) for _, labels in batches))


def _name(plan: SelectionPlan, *, attention: bool) -> str:
    experts, heads = plan.experts, plan.attention
    and_heads = f", attention top {heads.k}" if attention and isinstance(heads, TopK) else ""
    if isinstance(experts, Threshold):
        return f"threshold {experts.eps:.3g}{and_heads}"
    if isinstance(experts, TopK):
        return f"top {experts.k}{and_heads}"
    return "all experts"

"""The plan that a model loses least with."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_dsmoe.analysis import PlanResult, PlanSearch, evaluate_plan
from lightning_dsmoe.analysis.plans.divergence import divergence
from lightning_dsmoe.analysis.plans.routing_statistics import routing_statistics
from lightning_dsmoe.analysis.plans.solvers import FIXED_NUMBERS, THRESHOLDS, best_uniform
from lightning_dsmoe.commands.evaluation_setup import open_trained
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.files import check_file
from lightning_dsmoe.routing import Selection, SelectionPlan, Threshold, TopK


def calibrate(
    ckpt_path: str,
    budget: float | None = None,
    max_loss_increase: str | None = None,
    output: str = "plan.json",
    fixed: bool = False,
    **options: Any,
) -> None:
    """Find for each layer which experts to run, and say how much better that is than one rule.

    The first half of the text serves to find the plan, the second half to judge it.

    Args:
        ckpt_path: checkpoint of `fit`.
        budget: share of the hidden parameters to run at the most, in the mean over tokens; what
            runs under thresholds can end a little above it.
        max_loss_increase: instead of a budget, the loss to give up at the most, such as 0.5%.
        output: where to write the plan, as JSON.
        fixed: choose numbers of experts, the same for all tokens, instead of thresholds. Without
            it one pair of numbers for all layers, or one of attention experts beside a threshold of
            the others, is taken where it is clearly better.
        options: of the text and the device, see `open_trained`.

    Raises:
        ValueError: if not exactly one of budget and max_loss_increase is given or it cannot be met,
            or the checkpoint or the text is not fit for it.
    """
    if (budget is None) == (max_loss_increase is None):
        raise ValueError("calibrate needs either --budget or --max_loss_increase")
    check_file(output)
    increase = None if max_loss_increase is None else _percent(max_loss_increase)
    model, counts, text, _ = open_trained(ckpt_path, **options)
    found_on, judged_on = text.halves()
    dense = model.plan
    family = FIXED_NUMBERS if fixed else THRESHOLDS
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading the text with all experts")
        statistics = routing_statistics(model, found_on, counts)

        def measure(plan: SelectionPlan) -> PlanResult:
            progress.update(task, advance=1, description="trying plans")
            return evaluate_plan(model, plan, found_on, counts)

        search = PlanSearch(statistics, measure, family, partial(divergence, model, found_on))
        found = search.within(budget or 0.0) if increase is None else search.sparsest(increase)
        progress.update(task, description="judging the plan on the other half")
        judged = {
            "all experts": evaluate_plan(model, dense, judged_on, counts),
            "calibrated": evaluate_plan(model, found.plan, judged_on, counts),
        }
        uniform = best_uniform(
            routing_statistics(model, judged_on, counts),
            judged["calibrated"].active_share_mean,
            lambda plan: evaluate_plan(model, plan, judged_on, counts),
        )
    found.plan.save(output)
    if uniform is not None:
        judged[f"best of one rule: {_rule(uniform.plan, model.decoder)}"] = uniform.result
    Console().print(_table(judged))
    if uniform is not None:
        print(_comparison(judged["calibrated"], uniform.result))
    print(f"The plan is in {Path(output)}")


def _percent(text: str) -> float:
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise ValueError(f"max_loss_increase must be like 0.5% or 0.005, got {text!r}") from None
    if not 0 <= value < 10:
        raise ValueError(f"max_loss_increase must be from 0 to 1000%, got {text!r}")
    return value


def _rule(plan: SelectionPlan, decoder: Decoder) -> str:
    """What all feed-forward routers and all attention routers of a uniform plan run."""
    names = [
        next((_named(s) for s, n in zip(kind, sizes, strict=True) if n is not None), None)
        for kind, sizes in zip((plan.experts, plan.attention), decoder.plan_sizes, strict=True)
    ]
    return " and ".join(dict.fromkeys(name for name in names if name))


def _named(selection: Selection) -> str:
    if isinstance(selection, TopK):
        return f"top {selection.k}"
    assert isinstance(selection, Threshold)
    return f"threshold {selection.eps:.3g}"


def _comparison(calibrated: PlanResult, rule: PlanResult) -> str:
    gain, error = (nats / sum(rule.window_losses) for nats in calibrated.gain_over(rule))
    better = "better" if gain >= 0 else "worse"
    told = f"On unseen text the calibrated plan is {abs(gain):.3%} {better} than the best rule"
    return f"{told} (standard error {error:.3%})" if len(rule.window_losses) > 1 else told


def _table(judged: dict[str, PlanResult]) -> Table:
    table = Table("plan, on unseen text", "loss", "against all", "active", "p50", "p95")
    dense = judged["all experts"]
    for name, result in judged.items():
        table.add_row(
            name,
            f"{result.loss:.4f}",
            f"{result.loss / dense.loss - 1:+.2%}",
            f"{result.active_share_mean:.1%}",
            f"{result.active_share_p50:.1%}",
            f"{result.active_share_p95:.1%}",
        )
    return table

"""Calibrated plans against the best plans of one rule for all layers, on text that neither saw.

    python -m benchmarks.quality.calibration --text tinyshakespeare.txt --ckpt_paths runs/*.ckpt

For each checkpoint and budget, thresholds are found on the first half of the validation split as
`lightning-dsmoe calibrate` does, or numbers of experts with `--fixed`. On the second half their
loss is compared with that of the best uniform plan, which treats all layers alike: one threshold,
one number of experts of each kind, or a threshold for the feed-forward experts beside a number of
attention experts. It is chosen with hindsight on that half and may run as large a share as the
calibrated plan was measured to. The divergence from all experts, which varies less from text to
text than the loss, is compared with the least one of these uniform plans; it says little of models
that were finished sparsely, which may predict better with fewer experts. With `--twins` the
calibrated loss is also compared with that of dense models on the second half.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.timing import machine
from lightning_dsmoe.analysis import HeldOut, MeasuredText, PlanSearch, evaluate_plan
from lightning_dsmoe.analysis.plans.divergence import divergence
from lightning_dsmoe.analysis.plans.routing_statistics import routing_statistics
from lightning_dsmoe.analysis.plans.solvers import (
    FIXED_NUMBERS,
    THRESHOLDS,
    PlanFamily,
    uniform_plans,
)
from lightning_dsmoe.commands.evaluation_setup import open_trained
from lightning_dsmoe.files import write_text

BUDGETS = [0.12, 0.16, 0.25, 0.4]


def main() -> None:
    """Compare at every budget, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="the text that the models were trained on")
    parser.add_argument("--ckpt_paths", type=Path, nargs="+", required=True)
    parser.add_argument("--twins", type=Path, nargs="+", help="a dense model for each one")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--val_fraction", type=float, default=0.1)
    parser.add_argument("--max_tokens", type=int, default=sys.maxsize, help="tokens to use at most")
    parser.add_argument("--fixed", action="store_true", help="numbers of experts, not thresholds")
    parser.add_argument("--json", type=Path, default=Path("calibration.json"))
    options = parser.parse_args()
    twins = options.twins or [None] * len(options.ckpt_paths)
    if len(twins) != len(options.ckpt_paths):
        parser.error(f"--twins: {len(twins)} for {len(options.ckpt_paths)} of --ckpt_paths")
    source = {
        "files": options.text,
        "split": "val",
        "val_fraction": options.val_fraction,
        "test_fraction": 0.0,
        "max_tokens": options.max_tokens,
        "batch_tokens": 4096,
    }
    family = FIXED_NUMBERS if options.fixed else THRESHOLDS
    rows = []
    for path, twin in zip(options.ckpt_paths, twins, strict=True):
        rows += compare(path, options.budgets, family, source, twin=twin)
        write_text(options.json, json.dumps(rows, indent=1) + "\n")
    print(f"{rows[0]['machine'] if rows else machine()}\n\n{table(rows)}")


def compare(
    path: Path,
    budgets: list[float],
    family: PlanFamily,
    source: dict[str, Any],
    *,
    twin: Path | None = None,
) -> list[dict[str, Any]]:
    """Losses of one checkpoint at each budget that it can keep to.

    Args:
        path: of the checkpoint.
        budgets: active shares to calibrate for.
        family: the plans to search among.
        source: options of `open_trained` that say which text to use.
        twin: checkpoint of the dense model to compare with.
    """
    trained = open_trained(str(path), **source)
    model, counts = trained.model, trained.counts
    found_on, judged_on = trained.text.halves()
    statistics = routing_statistics(MeasuredText(model, found_on, counts))
    diverge, diverge_unseen = divergence(model, found_on), divergence(model, judged_on)
    unseen = routing_statistics(MeasuredText(model, judged_on, counts))
    dense = evaluate_plan(model, model.plan, judged_on, counts)
    twin_loss = None if twin is None else dense_loss(twin, source, judged_on)
    search = PlanSearch(
        statistics,
        lambda plan: evaluate_plan(model, plan, found_on, counts),
        family,
        lambda: diverge,
    )
    rows = []
    for budget in budgets:
        if budget < statistics.least_share:
            continue
        found = search.within(budget)
        calibrated = evaluate_plan(model, found.plan, judged_on, counts)
        plans = uniform_plans(unseen, calibrated.active_share_mean)
        rivals = [evaluate_plan(model, plan, judged_on, counts) for plan in plans]
        uniform = min(rivals, key=lambda result: result.loss)
        gain, error = (nats / sum(uniform.window_losses) for nats in calibrated.gain_over(uniform))
        rows.append(
            {
                "model": path.stem,
                "machine": machine(trained.text.device),
                "fixed": family is FIXED_NUMBERS,
                "budget": budget,
                "share": calibrated.active_share_mean,
                "loss": calibrated.loss,
                "all_experts": dense.loss,
                "dense_twin": twin_loss,
                "uniform_share": uniform.active_share_mean,
                "uniform_loss": uniform.loss,
                "divergence": sum(diverge_unseen(found.plan)) / judged_on.n_tokens,
                "uniform_divergence": min(sum(diverge_unseen(plan)) for plan in plans)
                / judged_on.n_tokens,
                "gain": gain,
                "gain_error": error,
            }
        )
        print(rows[-1], file=sys.stderr)
    return rows


def dense_loss(path: Path, source: dict[str, Any], text: HeldOut) -> float:
    """Loss of a dense model on the second half of its text, which must be this one."""
    model, counts, own_text, _ = open_trained(str(path), **source)
    _, second_half = own_text.halves()
    if second_half.fingerprint() != text.fingerprint():
        raise ValueError(f"{path} reads the text in other tokens or windows, so it is no twin")
    return evaluate_plan(model, model.plan, second_half, counts).loss


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line for each model and budget."""
    lines = [
        "| model | all experts | budget | calibrated: active | loss | against all "
        "| best uniform: active | loss | better by | standard error "
        "| divergence, nats per token | least of uniform plans | dense twin | against it |",
        "|---" * 14 + "|",
    ]
    lines += [
        f"| {row['model']} | {row['all_experts']:.4f} | {row['budget']:.0%} | {row['share']:.2%} "
        f"| {row['loss']:.4f} | {row['loss'] / row['all_experts'] - 1:+.3%} "
        f"| {row['uniform_share']:.2%} | {row['uniform_loss']:.4f} "
        f"| {row['gain']:.3%} | {row['gain_error']:.3%} "
        f"| {row['divergence']:.2g} | {row['uniform_divergence']:.2g} | {_against_twin(row)} |"
        for row in rows
    ]
    return "\n".join(lines)


def _against_twin(row: dict[str, Any]) -> str:
    twin = row["dense_twin"]
    return " | " if twin is None else f"{twin:.4f} | {row['loss'] / twin - 1:+.2%}"


if __name__ == "__main__":
    main()

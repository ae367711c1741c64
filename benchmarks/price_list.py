"""What sparsity costs: loss and smallest safe active share against the MI weights.

    python benchmarks/price_list.py --json reproduce.json --output prices.md --picture prices.png

Reads runs of `reproduce.py`, of one number of steps or of several. A share is safe if under the
threshold that runs it, and under every lower one, the loss is within 0.1 % of that with all
experts.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from comparisons import Run
from matplotlib.figure import Figure
from reproduce_models import ALL_STRENGTHS, DENSE, FINISHED, FINISHINGS

from lightning_dsmoe.files import write_text

PRICED = (*(f"DS-MoE, {strength}" for strength in ALL_STRENGTHS), *FINISHED)
"""Models whose MI weights stay as they are in training."""
TOLERANCE = 1e-3
"""Share of the loss with all experts that a safe share may add."""


class Price(NamedTuple):
    """Means over the seeds of one model.

    Args:
        size: parameters, in millions.
        steps: optimizer steps.
        weights: of the loss of each feed-forward and each attention router.
        finishing: threshold of the last part of training, None without.
        seeds: number of seeds.
        loss: with all experts, in nats per token.
        over_dense: share of the loss of the dense twin that this is more, of seeds that have
            one; None without any.
        safe_share: smallest safe share.
        safe_loss: loss at that share.
    """

    size: float
    steps: int
    weights: tuple[float, float]
    finishing: float | None
    seeds: int
    loss: float
    over_dense: float | None
    safe_share: float
    safe_loss: float


def main() -> None:
    """Print the list and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, nargs="+", required=True, help="of `reproduce.py`")
    parser.add_argument("--output", type=Path, help="also write the table here, as Markdown")
    parser.add_argument("--picture", type=Path, help="draw the list here, as .svg or .png")
    options = parser.parse_args()
    runs = [run for path in options.json for run in json.loads(path.read_text("utf-8"))]
    found = prices(runs)
    if not found:
        sys.exit("none of the runs is of DS-MoE under constant MI weights")
    print(table(found))
    if options.output:
        write_text(options.output, table(found) + "\n")
    if options.picture:
        figure(found).savefig(options.picture, dpi=150)


def prices(runs: Sequence[Run]) -> list[Price]:
    """The list, by size, steps, finishing and weights."""
    dense: dict[Any, float] = {}
    groups: dict[Any, dict[int, Run]] = {}
    for run in runs:
        name, seed = run["settings"]["model"], run["settings"]["seed"]
        config = run["settings"]["configuration"]
        model, steps = config["model"]["init_args"], config["trainer"]["max_steps"]
        shape = model["d_model"], model["n_layers"], steps
        if name == DENSE:
            dense[*shape, seed] = run["points"][0]["loss"]
        elif name in PRICED:
            weights = model["expert_mi_weight"], model["attention_mi_weight"]
            groups.setdefault((shape, _finishing(name), weights), {})[seed] = run
    found = []
    for (shape, finishing, weights), group in groups.items():
        twins = {seed: dense[*shape, seed] for seed in group if (*shape, seed) in dense}
        losses = {seed: run["points"][0]["loss"] for seed, run in group.items()}
        safe = [safe_point(run) for run in group.values()]
        share, safe_loss = (mean(values) for values in zip(*safe, strict=True))
        found.append(
            Price(
                next(iter(group.values()))["parameters"] / 1e6,
                shape[-1],
                weights,
                finishing,
                len(group),
                mean(losses.values()),
                mean(losses[seed] / twin - 1 for seed, twin in twins.items()) if twins else None,
                share,
                safe_loss,
            )
        )
    return sorted(found, key=lambda p: (p.size, p.steps, p.finishing or 0.0, p.weights))


def safe_point(run: Run) -> tuple[float, float]:
    """Smallest safe share of a run and the loss there, interpolated between two plans."""
    line = sorted(
        (p["share"], p["loss"]) for p in run["points"] if p["rule"] in ("threshold", "all")
    )
    most = run["points"][0]["loss"] * (1 + TOLERANCE)
    for (left, before), (right, after) in itertools.pairwise(reversed(line)):
        if after > most:
            part = (most - before) / (after - before)
            return left + part * (right - left), most
    return line[0]


def table(found: Sequence[Price]) -> str:
    """Markdown: one line for each model."""
    lines = [
        "| parameters, M | steps | MI weight, experts / attention | finished under | seeds "
        "| all experts | against dense | smallest safe share | loss there |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for price in found:
        weights = " / ".join(f"{weight:g}" for weight in price.weights)
        over = "" if price.over_dense is None else f"{price.over_dense:+.2%}"
        finishing = "" if price.finishing is None else f"threshold {price.finishing:g}"
        lines.append(
            f"| {price.size:.1f} | {price.steps:,} | {weights} | {finishing} | {price.seeds} "
            f"| {price.loss:.4f} | {over} | {price.safe_share:.1%} | {price.safe_loss:.4f} |"
        )
    return "\n".join(lines)


def figure(found: Sequence[Price]) -> Figure:
    """Loss over that of the dense twin, and smallest safe share, against the experts' weight."""
    drawn = Figure(figsize=(9, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    keys = dict.fromkeys((price.size, price.steps, price.finishing) for price in found)
    for number, (size, steps, finishing) in enumerate(keys):
        line = [p for p in found if (p.size, p.steps, p.finishing) == (size, steps, finishing)]
        weights = [price.weights[0] for price in line]
        ending = "" if finishing is None else f", finished under {finishing:g}"
        style = {
            "color": f"C{number}",
            "marker": "o",
            "label": f"{size:.1f} M, {steps:,} steps{ending}",
        }
        if all(price.over_dense is not None for price in line):
            left.plot(weights, [100 * (price.over_dense or 0.0) for price in line], **style)
        right.plot(weights, [100 * price.safe_share for price in line], **style)
    left.axhline(0, color="black", linestyle="--", linewidth=1)
    left.set(ylabel="loss with all experts over the dense twin's, %")
    right.set(ylabel="smallest safe active share, %", ylim=(0, None))
    ticks = sorted({price.weights[0] for price in found})
    for axes in (left, right):
        axes.set(xscale="log", xlabel="MI weight of the feed-forward experts")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    right.legend(fontsize="small")
    return drawn


def _finishing(model: str) -> float | None:
    return FINISHINGS[FINISHED[model][1]][0] if model in FINISHED else None


if __name__ == "__main__":
    main()

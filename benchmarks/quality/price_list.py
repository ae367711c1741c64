"""What sparsity costs: loss and smallest safe active share against the MI weights.

    python -m benchmarks.quality.price_list --json reproduce.json --picture prices.png

Reads runs of `reproduce.py`, of one number of steps or of several. A share is safe if under the
threshold that runs it, and under every lower one, the loss is within 0.1 % of that with all
experts.
"""

import argparse
import copy
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.quality.comparisons import ROUNDING, Run, loss_at, threshold_line
from benchmarks.quality.finishing import FINISHINGS
from benchmarks.quality.models import DENSE, EVERY_DS_MOE, FINISHED
from lightning_dsmoe.files import write_text

PRICED = (*EVERY_DS_MOE.values(), *FINISHED)
"""Models whose MI weights stay as they are in training."""
TOLERANCE = 1e-3
"""Share of the loss with all experts that a safe share may add."""
SHARES = (0.15, 0.25)
"""Active shares to tell the loss at, those that aims are set for."""


class Price(NamedTuple):
    """Means over the seeds of one model.

    Args:
        size: parameters, in millions.
        steps: optimizer steps.
        weights: of the loss of each feed-forward and each attention router.
        finishing: plan of the last part of training, empty without.
        seeds: number of seeds.
        loss: with all experts, in nats per token.
        over_dense: share of the loss of the dense twin that this is more, of seeds that have
            one; None without any.
        safe_share: smallest safe share.
        losses: at each of `SHARES`, see `lowest_loss`.
    """

    size: float
    steps: int
    weights: tuple[float, float]
    finishing: str
    seeds: int
    loss: float
    over_dense: float | None
    safe_share: float
    losses: tuple[float, ...]


def main() -> None:
    """Print the list and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, nargs="+", required=True, help="of `reproduce.py`")
    parser.add_argument("--output", type=Path, help="also write the table here, as Markdown")
    parser.add_argument("--picture", type=Path, help="draw the list here, as .svg or .png")
    options = parser.parse_args()
    runs = [run for path in options.json for run in json.loads(path.read_text("utf-8"))]
    try:
        found = prices(runs)
    except ValueError as error:
        sys.exit(str(error))
    if not found:
        sys.exit("none of the runs is of DS-MoE under constant MI weights")
    print(table(found))
    if options.output:
        write_text(options.output, table(found) + "\n")
    if options.picture:
        figure(found).savefig(options.picture, dpi=150)


def prices(runs: Sequence[Run]) -> list[Price]:
    """The list, by size, steps, finishing and weights.

    Raises:
        ValueError: if there are two runs of a model with the same seed.
    """
    groups: dict[Any, dict[int, Run]] = {}
    for run in runs:
        name, seed = run["settings"]["model"], run["settings"]["seed"]
        if name == DENSE or name in PRICED:
            group = groups.setdefault((_recipe(run), name), {})
            if group.setdefault(seed, run) is not run:
                raise ValueError(f"there are two runs of {name} with seed {seed}; keep one")
    found = []
    for (recipe, name), group in groups.items():
        if name == DENSE:
            continue
        run = next(iter(group.values()))
        config = run["settings"]["configuration"]
        model, twins = config["model"]["init_args"], groups.get((recipe, DENSE), {})
        over = [_loss(group[seed]) / _loss(twins[seed]) - 1 for seed in group if seed in twins]
        found.append(
            Price(
                run["parameters"] / 1e6,
                config["trainer"]["max_steps"],
                (model["expert_mi_weight"], model["attention_mi_weight"]),
                FINISHINGS[FINISHED[name][1]].name if name in FINISHED else "",
                len(group),
                mean(map(_loss, group.values())),
                mean(over) if over else None,
                mean(map(safe_share, group.values())),
                tuple(mean(lowest_loss(run, s) for run in group.values()) for s in SHARES),
            )
        )
    return sorted(found, key=lambda p: (p.size, p.steps, p.finishing, p.weights))


def lowest_loss(run: Run, share: float) -> float:
    """The lowest loss of at most a share under any rule; NaN if none runs so little."""
    losses = [
        point["loss"]
        for point in run["points"]
        if point["rule"] in ("threshold", "top-k", "mixed") and point["share"] < share + ROUNDING
    ]
    between = loss_at(run, share)
    return min(losses if between is None else [*losses, between], default=math.nan)


def safe_share(run: Run) -> float:
    """Smallest safe share of a run, interpolated between two plans."""
    line = threshold_line(run)
    most = _loss(run) * (1 + TOLERANCE)
    for (more, before), (fewer, after) in itertools.pairwise(reversed(line)):
        if after > most:
            return float(more + (most - before) / (after - before) * (fewer - more))
    return float(line[0][0])


def table(found: Sequence[Price]) -> str:
    """Markdown: one line for each model."""
    at = " | ".join(f"at {share:.0%}" for share in SHARES)
    lines = [
        "| parameters, M | steps | MI weight, experts / attention | finished under | seeds "
        f"| loss of all experts | against dense | smallest safe share | loss {at} |",
        "|---" * (8 + len(SHARES)) + "|",
    ]
    for price in found:
        weights = " / ".join(f"{weight:g}" for weight in price.weights)
        over = "" if price.over_dense is None else f"{price.over_dense:+.2%}"
        losses = " | ".join("" if math.isnan(loss) else f"{loss:.4f}" for loss in price.losses)
        lines.append(
            f"| {price.size:.1f} | {price.steps:,} | {weights} | {price.finishing} | {price.seeds} "
            f"| {price.loss:.4f} | {over} | {price.safe_share:.1%} | {losses} |"
        )
    return "\n".join(lines)


def figure(found: Sequence[Price]) -> Figure:
    """Loss over that of the dense twin against smallest safe share, a line for each training.

    Lines join plain trainings and are labelled with the experts' MI weight; what was finished under
    a plan is a star, numbered in the legend.
    """
    drawn = Figure(figsize=(9, 7.5), layout="constrained")
    axes = drawn.subplots()
    known = [price for price in found if price.over_dense is not None]
    sizes = list(dict.fromkeys((price.size, price.steps) for price in known))
    finished = sorted((p for p in known if p.finishing), key=lambda p: p.safe_share)
    beside = (-12, -4), (-4, -17), (-4, 9), (9, -4)  # by turns: neighbours are close to each other
    for number, (size, steps) in enumerate(sizes):
        line = [p for p in known if (p.size, p.steps) == (size, steps) and not p.finishing]
        points = [_point(price) for price in line]
        if points:
            style = {"color": f"C{number}", "label": f"{size:.1f} M, {steps:,} steps"}
            axes.plot(*zip(*points, strict=True), "o-", **style)
        for price, point in zip(line, points, strict=True):
            label = f"{price.weights[0]:g}"
            axes.annotate(label, point, (5, 6), textcoords="offset points", color=f"C{number}")
    for number, price in enumerate(finished, start=1):
        color = f"C{sizes.index((price.size, price.steps))}"
        label = (
            f"{number}: {price.size:.1f} M, {price.steps:,} steps, {price.weights[0]:g}, "
            f"finished under {price.finishing}"
        )
        point = _point(price)
        axes.plot(*point, "*", color=color, markersize=11, label=label)
        offset = beside[(number - 1) % len(beside)]
        axes.annotate(f"{number}", point, offset, textcoords="offset points", color=color)
    axes.axhline(0, color="black", linestyle="--", linewidth=1)
    axes.set(ylabel="loss with all experts over the dense twin's, %")
    axes.margins(0.08)
    axes.set(xlabel="smallest safe active share, %; at points: MI weights")
    drawn.legend(loc="outside lower center", fontsize="small")
    return drawn


def _point(price: Price) -> tuple[float, float]:
    """Where a price is drawn, in per cent."""
    assert price.over_dense is not None
    return 100 * price.safe_share, 100 * price.over_dense


def _loss(run: Run) -> float:
    """Loss with all experts."""
    return float(run["points"][0]["loss"])


def _recipe(run: Run) -> str:
    """What a model and its dense twin have in common, whatever the seed; the GPU is part of it."""
    config = copy.deepcopy(run["settings"]["configuration"])
    model = config["model"]["init_args"]
    for name in ("attention", "feed_forward", "expert_mi_weight", "attention_mi_weight"):
        del model[name]
    model.pop("consistency_weight", None)
    del config["seed_everything"], config["data"]["init_args"]["seed"]
    del config["trainer"]["callbacks"]
    gpu = run["machine"].get("gpu")
    return json.dumps([run["settings"]["text"], gpu, config], sort_keys=True)


if __name__ == "__main__":
    main()

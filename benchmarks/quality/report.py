"""What `reproduce.py` found, as tables and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.claims import judge, verdict
from benchmarks.quality.comparisons import Run, Runs, as_trained
from benchmarks.quality.models import DENSE, DS_MOE

STYLES = {"threshold": "-", "top-k": ":", "mixed": "--"}
"""Rules of the plans of a frontier, and how they are drawn."""

Points = list[Mapping[str, Any]]
"""A point of each seed."""


def tables(runs: Runs, shares: Sequence[float]) -> str:
    """Markdown: the models as they were trained, their frontiers, and the claims.

    Args:
        runs: all runs, one at least.
        shares: active shares of the frontiers.
    """
    on = next(iter(next(iter(runs.values())).values()))["machine"]
    begin = (
        f"{on.get('gpu', on['cpu'])}, {on['threads']} threads a run, torch {on['torch']}, "
        f"{on['date']}. Losses are means over seeds, with the lowest and the highest."
    )
    parts = (_models(runs), _frontiers(runs, shares), _claims(runs))
    return "\n\n".join([begin, *("\n".join(lines) for lines in parts)])


def figure(runs: Runs, shares: Sequence[float], path: Path) -> None:
    """Loss against the hidden parameters that run, means over seeds.

    Frontiers of thresholds have a band from the lowest to the highest seed; models that were
    trained for one number of active parameters are dots.

    Args:
        runs: all runs, one at least.
        shares: active shares of the frontiers.
        path: where to draw it; its suffix is the format.
    """
    drawn = Figure(figsize=(8, 5), layout="constrained")
    axes = drawn.subplots()
    unit = _first(runs.get(DENSE) or next(iter(runs.values())))["hidden"] / 100
    for number, (model, by_seed) in enumerate(runs.items()):
        trained = [as_trained(run) for run in by_seed.values()]
        hidden = _first(by_seed)["hidden"] / unit
        if model == DENSE:
            axes.axhline(_loss(trained), color="black", linestyle="--", label=model)
        elif model in DS_MOE.values():
            for rule, style in STYLES.items():
                line = [*_at_shares(by_seed, rule, shares).values(), trained]
                _draw(axes, line, hidden, style, f"C{number}", f"{model}, {rule}")
        else:
            axes.plot(hidden * _share(trained), _loss(trained), f"C{number}o", label=model)
    worst = max(_loss([run["points"][0] for run in by_seed.values()]) for by_seed in runs.values())
    axes.set(xlabel="hidden parameters that run, % of the dense model's", ylim=(None, 1.05 * worst))
    axes.set(ylabel="loss, nats per token", xlim=(0, None))
    axes.legend(fontsize="small")
    drawn.savefig(path, dpi=150)


def _draw(
    axes: Axes, line: list[Points], hidden: float, style: str, color: str, label: str
) -> None:
    x = [hidden * _share(points) for points in line]
    axes.plot(x, [_loss(points) for points in line], style, color=color, label=label)
    if style == STYLES["threshold"]:
        losses = [[point["loss"] for point in points] for points in line]
        lowest, highest = [min(y) for y in losses], [max(y) for y in losses]
        axes.fill_between(x, lowest, highest, color=color, alpha=0.2, linewidth=0)


def _models(runs: Runs) -> list[str]:
    lines = [
        "| model | seeds | parameters, M | hidden, M | active, M | share | loss as trained "
        "| against dense | minutes of training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    dense = [as_trained(run) for run in runs.get(DENSE, {}).values()]
    for model, by_seed in runs.items():
        run, trained = _first(by_seed), [as_trained(run) for run in by_seed.values()]
        share, hidden = _share(trained), run["hidden"] / 1e6
        difference = f"{_loss(trained) / _loss(dense) - 1:+.2%}" if dense else ""
        minutes = mean(run["seconds"] for run in by_seed.values()) / 60
        lines.append(
            f"| {model} | {len(by_seed)} | {run['parameters'] / 1e6:.3f} | {hidden:.3f} "
            f"| {share * hidden:.3f} | {share:.1%} | {_spread(trained)} | {difference} "
            f"| {minutes:.1f} |"
        )
    return lines


def _frontiers(runs: Runs, shares: Sequence[float]) -> list[str]:
    lines = [
        "| loss at an active share of | "
        + " | ".join(f"{share:.0%}" for share in shares)
        + " | all experts |",
        "|---" * (2 + len(shares)) + "|",
    ]
    for model, by_seed in runs.items():
        every = [run["points"][0] for run in by_seed.values()]
        for rule in STYLES:
            found = _at_shares(by_seed, rule, shares)
            if found:
                cells = [_cell(found[share], share) if share in found else "" for share in shares]
                lines.append(f"| {model}, {rule} | {' | '.join(cells)} | {_spread(every)} |")
    return lines


def _claims(runs: Runs) -> list[str]:
    lines = ["| claim | verdict | differences | holds if in all seeds |", "|---|---|---|---|"]
    for claim in judge(runs):
        figures = []
        for comparison in claim.comparisons:
            values = comparison.differences.values()
            shown = "not measured"
            if values:
                shown = f"{mean(values):+.2%} ({min(values):+.2%} to {max(values):+.2%})"
            unlike = "" if verdict(comparison) == claim.verdict else f", {verdict(comparison)}"
            figures.append(f"{comparison.name}: {shown}{unlike}")
        if not any(comparison.differences for comparison in claim.comparisons):
            figures = ["not measured"]
        lines.append(
            f"| {claim.claim} | **{claim.verdict}** | {'; '.join(figures)} | {claim.rule} |"
        )
    return lines


def _at_shares(
    by_seed: Mapping[int, Run], rule: str, shares: Sequence[float]
) -> dict[float, Points]:
    """Points of a rule by the share they were to keep to."""
    found: dict[float, Points] = {}
    for share in shares:
        for run in by_seed.values():
            for point in run["points"]:
                if point["rule"] == rule and point["budget"] == share:
                    found.setdefault(share, []).append(point)
    return found


def _cell(points: Points, share: float) -> str:
    measured = _share(points)
    return _spread(points) + (f" at {measured:.1%}" if abs(measured - share) > 0.0005 else "")


def _spread(points: Points) -> str:
    losses = [point["loss"] for point in points]
    return f"**{mean(losses):.4f}** ({min(losses):.4f} to {max(losses):.4f})"


def _loss(points: Points) -> float:
    return mean(point["loss"] for point in points)


def _share(points: Points) -> float:
    return mean(point["share"] for point in points)


def _first(by_seed: Mapping[int, Run]) -> Run:
    return next(iter(by_seed.values()))

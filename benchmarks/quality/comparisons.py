"""Differences between runs of `reproduce.py`, one for each seed, that its claims come down to."""

import itertools
from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.quality.models import DS_MOE, MI_WEIGHTS

Run = Mapping[str, Any]
"""What `runs.carry_out` gave."""
Runs = Mapping[str, Mapping[int, Run]]
"""Runs by model and seed."""

ROUNDING = 1e-4
"""Difference of shares that is none."""


class Comparison(NamedTuple):
    """Differences by seed, which have to be below a limit."""

    name: str
    differences: Mapping[int, float]
    limit: float = 0.0


def threshold_line(run: Run) -> list[tuple[float, float]]:
    """Shares under thresholds and the losses there, ascending, all experts last."""
    return sorted(
        (p["share"], p["loss"]) for p in run["points"] if p["rule"] in ("threshold", "all")
    )


def loss_at(run: Run, share: float) -> float | None:
    """Loss under a threshold that runs a share of the hidden parameters; None below the least one.

    Between two plans it is interpolated: with one of them for some texts and the other for the
    rest, a model has just that share and that loss in the mean.
    """
    line = threshold_line(run)
    if share >= line[-1][0]:
        return line[-1][1]
    if line[0][0] - ROUNDING < share < line[0][0]:
        return line[0][1]
    for (left, before), (right, after) in itertools.pairwise(line):
        if left <= share < right:
            return before + (after - before) * (share - left) / (right - left)
    return None


def as_trained(run: Run) -> Mapping[str, Any]:
    """The point of the plan that a model was trained under, all experts unless it was sparse."""
    return next((p for p in run["points"] if p["rule"] == "as trained"), run["points"][0])


def against(
    runs: Runs, reference: str, share: float | None = None, *, limit: float = 0.0
) -> Comparison:
    """Compare DS-MoE, under the MI weight that is best for it, with another model as trained.

    Args:
        runs: all runs.
        reference: the other model.
        share: active share of DS-MoE; None for as many hidden parameters as run in the other.
        limit: limit of the relative difference of the losses.
    """
    found = []
    for strength, model in DS_MOE.items():
        losses = {}
        for seed, run, other in _pairs(runs, model, reference):
            point = as_trained(other)
            at = point["share"] * other["hidden"] / run["hidden"] if share is None else share
            loss = loss_at(run, at)
            if loss is not None:
                losses[seed] = loss, point["loss"]
        if losses:
            own, others = (mean(side) for side in zip(*losses.values(), strict=True))
            differences = {seed: loss / other - 1 for seed, (loss, other) in losses.items()}
            name = f"{strength}, {own:.4f} against {others:.4f}"
            found.append((own, Comparison(name, differences, limit)))
    return min(found, default=(0.0, Comparison(reference, {}, limit)), key=lambda each: each[0])[1]


def sparser(runs: Runs) -> list[Comparison]:
    """Share of the feed-forward experts that run less that of the attention experts.

    Models count whose MI weight is the same for both kinds.
    """
    found = []
    for strength, given in MI_WEIGHTS.items():
        if given is None or len(set(given)) > 1:
            continue
        for share, of in (("share", "all"), ("beyond_one", "those beyond one")):
            pairs = {
                seed: [run["running"][kind][share] for kind in ("experts", "attention")]
                for seed, run in runs.get(DS_MOE[strength], {}).items()
            }
            means = [f"{mean(side):.1%}" for side in zip(*pairs.values(), strict=True)]
            differences = {
                seed: experts - attention for seed, (experts, attention) in pairs.items()
            }
            found.append(Comparison(f"{strength}, {' and '.join(means)} of {of}", differences))
    return found


def flatter(runs: Runs, share: float) -> list[Comparison]:
    """Rise of the loss under a larger MI weight less that under the next smaller one."""
    found = []
    rises = {strength: _rises(runs.get(model, {}), share) for strength, model in DS_MOE.items()}
    for smaller, larger in itertools.pairwise(rises):
        before, after = rises[smaller], rises[larger]
        differences = {seed: after[seed] - before[seed] for seed in before if seed in after}
        shown = [f"{s}, {mean(rises[s].values()):+.2%}" for s in (smaller, larger) if rises[s]]
        found.append(Comparison(" to ".join(shown), differences))
    return found


def thresholds_against_top_k(runs: Mapping[int, Run], limit: float) -> list[Comparison]:
    """Relative difference of the losses at each share that the numbers of experts run."""
    found: dict[float, dict[int, float]] = {}
    for seed, run in runs.items():
        for point in run["points"]:
            if point["rule"] == "top-k":
                loss = loss_at(run, point["share"])
                if loss is not None:
                    found.setdefault(point["budget"], {})[seed] = loss / point["loss"] - 1
    return [Comparison(f"{share:.0%}", found[share], limit) for share in sorted(found)]


def _pairs(runs: Runs, model: str, reference: str) -> Iterator[tuple[int, Run, Run]]:
    """Seeds that both models have, with both runs."""
    others = runs.get(reference, {})
    for seed, run in runs.get(model, {}).items():
        if seed in others:
            yield seed, run, others[seed]


def _rises(runs: Mapping[int, Run], share: float) -> dict[int, float]:
    """Relative rise of the loss by seed, from all experts to a small share."""
    losses = {seed: (loss_at(run, share), loss_at(run, 1.0)) for seed, run in runs.items()}
    return {s: sparse / dense - 1 for s, (sparse, dense) in losses.items() if sparse and dense}

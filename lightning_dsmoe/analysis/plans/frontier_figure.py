"""A picture of loss against active share."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_dsmoe.analysis.evaluation import PlanResult
from lightning_dsmoe.analysis.plans.frontier import frontier, knee

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = ("threshold top-k", "threshold", "top-p", "top", "all")


def frontier_figure(results: Mapping[str, PlanResult]) -> "Figure":
    """Loss against active share of every plan, the frontier as a line, its knee marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    names, points = list(results), [(r.share, r.loss) for r in results.values()]
    best = frontier(points)
    axes.plot(*zip(*(_at(points[n]) for n in best), strict=True), color="0.6", zorder=1)
    for kind in _KINDS:
        some = [_at(p) for name, p in zip(names, points, strict=True) if _kind(name) == kind]
        if some:
            shares, losses = zip(*some, strict=True)
            axes.scatter(shares, losses, s=22, label=_LABELS[kind], zorder=2)
    number = knee(points)
    axes.annotate(
        f"{names[number]}\n{points[number][0]:.1%} active",
        _at(points[number]),
        xytext=(18, 28),
        textcoords="offset points",
        arrowprops={"arrowstyle": "->"},
    )
    axes.set(xlabel="active share of the hidden parameters, %", ylabel="loss, nats per token")
    axes.set(xlim=(0, 103))
    axes.legend()
    return figure


_LABELS = {
    "all": "all experts",
    "top": "top-k",
    "threshold": "threshold",
    "threshold top-k": "threshold top-k",
    "top-p": "top-p",
}


def _kind(name: str) -> str:
    if name.startswith("all experts, top"):
        return "top"
    return next(kind for kind in _KINDS if name.startswith(kind))


def _at(point: tuple[float, float]) -> tuple[float, float]:
    return 100 * point[0], point[1]

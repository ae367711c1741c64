"""Many plans of one model, and those worth having: the frontier of loss against active share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_dsmoe.analysis.evaluation import PlanResult
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.routing import (
    AllExperts,
    Selection,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float]
"""Active share and loss."""

EPS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
P = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
NUMBERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_KINDS = ("threshold top-k", "threshold", "top-p", "top", "all")


def sweep_plans(decoder: Decoder) -> dict[str, SelectionPlan]:
    """Plans by name: dense; then fixed numbers, thresholds and probabilities.

    The same selection runs in both kinds of experts, and then fixed numbers and thresholds in one
    kind alone, all experts of the other running.

    Args:
        decoder: the model; layers without a router run whole.
    """
    n_experts, n_attention = decoder.plan_sizes
    plans = {"all": SelectionPlan.uniform(decoder.n_layers)}

    def add(name: str, experts: Selection, attention: Selection) -> None:
        plans[name] = SelectionPlan.uniform(decoder.n_layers, experts=experts, attention=attention)

    few, few_heads = _numbers(n_experts), _numbers(n_attention)
    for place, k in enumerate(few):
        k_heads = few_heads[min(place, len(few_heads) - 1)] if few_heads else 1
        add(f"top {k} and {k_heads}", TopK(k), TopK(k_heads))
    least = min((n for n in n_experts + n_attention if n is not None), default=0)
    for eps in (eps for eps in EPS if eps < least):
        add(f"threshold {eps:g}", Threshold(eps), Threshold(eps))
        add(f"threshold top-k {eps:g}", ThresholdTopK(eps), ThresholdTopK(eps))
    for p in P:
        add(f"top-p {p:g}", TopP(p), TopP(p))
    for k in few:
        add(f"top {k}, all attention", TopK(k), AllExperts())
    for k in few_heads:
        add(f"all experts, top {k} attention", AllExperts(), TopK(k))
    return plans


def frontier(points: Sequence[Point]) -> list[int]:
    """Numbers of the points that no other beats at both, by ascending share."""
    best: list[int] = []
    for number in sorted(range(len(points)), key=lambda n: points[n]):
        if not best or points[number][1] < points[best[-1]][1]:
            best.append(number)
    return best


def knee(points: Sequence[Point]) -> int:
    """Number of the point of the frontier where more experts stop paying.

    It is the point of the frontier farthest below the falling diagonal, both axes scaled to 1: the
    share from the least to the most of all points, the loss from the frontier's worst to its best
    (Satopaa et al. 2011, "Finding a Kneedle in a Haystack").

    Raises:
        ValueError: if there are no points.
    """
    if not points:
        raise ValueError("there is no knee without points")
    best = frontier(points)
    (left, top), (_, bottom) = points[best[0]], points[best[-1]]
    right = max(share for share, _ in points)

    def below(number: int) -> float:
        share, loss = points[number]
        across = (share - left) / (right - left or 1)
        down = (top - loss) / (top - bottom or 1)
        return down - across

    return max(best, key=below)


def frontier_figure(results: Mapping[str, PlanResult]) -> "Figure":
    """Loss against active share of every plan, the frontier as a line, its knee marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    names, points = list(results), [(r.active_share_mean, r.loss) for r in results.values()]
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


def _numbers(counts: Sequence[int | None]) -> list[int]:
    """Numbers of experts that are fewer than those of any layer with a router."""
    least = min((count for count in counts if count is not None), default=0)
    return [number for number in NUMBERS if number < least]

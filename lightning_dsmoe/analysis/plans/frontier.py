"""Many plans of one model, and those worth having: the frontier of loss against active share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_dsmoe import routing
from lightning_dsmoe.analysis.evaluation import PlanResult
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.routing import SelectionPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float]
"""Active share and loss of a plan."""

EPS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
P = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
NUMBERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_LABELS = {
    "threshold top-k": "threshold top-k",
    "threshold": "threshold",
    "top-p": "top-p",
    "top": "top-k",
    "all experts, top": "top-k",
    "all": "all experts",
}
"""Of plans in the figure, by how their name starts; the first that matches."""


def sweep_plans(decoder: Decoder) -> dict[str, SelectionPlan]:
    """Some forty uniform plans: dense, top-k, thresholds and top-p.

    The same kind of selection runs in feed-forward and attention experts; then top-k in one of the
    two, while all experts of the other run.

    Args:
        decoder: the model; layers without a router run whole.

    Returns:
        Plans by name, such as "threshold 0.5".

    Examples:
        >>> from functools import partial
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe.analysis import sweep_plans
        >>> decoder = Decoder(
        ...     256,
        ...     16,
        ...     2,
        ...     attention=partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8),
        ...     feed_forward=partial(MixtureOfExperts, n_experts=8, d_expert=4),
        ... )
        >>> plans = sweep_plans(decoder)
        >>> list(plans)[:3]
        ['all', 'top 1 and 1', 'top 2 and 2']
        >>> plans["threshold 0.5"].experts[0].eps
        0.5
    """
    n_experts, n_attention = decoder.plan_sizes
    plans = {"all": SelectionPlan.uniform(decoder.n_layers)}

    def add(name: str, experts: routing.Selection, attention: routing.Selection) -> None:
        plans[name] = SelectionPlan.uniform(decoder.n_layers, experts=experts, attention=attention)

    few, few_heads = _numbers(n_experts), _numbers(n_attention)
    for place, k in enumerate(few):
        k_heads = few_heads[min(place, len(few_heads) - 1)] if few_heads else 1
        add(f"top {k} and {k_heads}", routing.TopK(k), routing.TopK(k_heads))
    least = min((n for n in n_experts + n_attention if n is not None), default=0)
    for eps in (eps for eps in EPS if eps < least):
        add(f"threshold {eps:g}", routing.Threshold(eps), routing.Threshold(eps))
        add(f"threshold top-k {eps:g}", routing.ThresholdTopK(eps), routing.ThresholdTopK(eps))
    for p in P:
        add(f"top-p {p:g}", routing.TopP(p), routing.TopP(p))
    for k in few:
        add(f"top {k}, all attention", routing.TopK(k), routing.AllExperts())
    for k in few_heads:
        add(f"all experts, top {k} attention", routing.AllExperts(), routing.TopK(k))
    return plans


def frontier(points: Sequence[Point]) -> list[int]:
    """The points that no other beats in both share and loss.

    Args:
        points: active share and loss of each plan.

    Returns:
        Indices of these points, by ascending share.

    Examples:
        >>> from lightning_dsmoe.analysis import frontier
        >>> frontier([(1.0, 1.4), (0.3, 1.5), (0.5, 1.6)])  # the last runs more at a higher loss
        [1, 0]
    """
    best: list[int] = []
    for number in sorted(range(len(points)), key=lambda n: points[n]):
        if not best or points[number][1] < points[best[-1]][1]:
            best.append(number)
    return best


def knee(points: Sequence[Point]) -> int:
    """The point of the frontier where more experts stop paying.

    It is the point of the frontier farthest below the falling diagonal, both axes scaled to 1: the
    share from the least to the most of all points, the loss from the frontier's worst to its best
    (Satopaa et al. 2011, "Finding a Kneedle in a Haystack").

    Args:
        points: active share and loss of each plan.

    Returns:
        Index of that point.

    Raises:
        ValueError: if there are no points.

    Examples:
        >>> from lightning_dsmoe.analysis import knee
        >>> knee([(1.0, 1.40), (0.3, 1.41), (0.1, 1.90)])
        1
    """
    if not points:
        raise ValueError("there is no knee without points")
    best = frontier(points)
    (left, top), (_, bottom) = points[best[0]], points[best[-1]]
    # The most of all points, not of the frontier: where a sparse plan has the lowest loss, that is
    # narrow, and chance differences scaled to 1 would look like a bend.
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
    names = list(results)
    points = [(100 * result.active_share_mean, result.loss) for result in results.values()]
    axes.plot(*zip(*(points[n] for n in frontier(points)), strict=True), color="0.6", zorder=1)
    by_label: dict[str, list[Point]] = {label: [] for label in _LABELS.values()}
    for name, point in zip(names, points, strict=True):
        label = next(label for start, label in _LABELS.items() if name.startswith(start))
        by_label[label].append(point)
    for label, some in by_label.items():
        if some:
            shares, losses = zip(*some, strict=True)
            axes.scatter(shares, losses, s=22, label=label, zorder=2)
    number = knee(points)
    axes.annotate(
        f"{names[number]}\n{points[number][0]:.1f} % active",
        points[number],
        xytext=(18, 28),
        textcoords="offset points",
        arrowprops={"arrowstyle": "->"},
    )
    axes.set(xlabel="active share of the hidden parameters, %", ylabel="loss, nats per token")
    axes.set(xlim=(0, 103))
    axes.legend()
    return figure


def _numbers(counts: Sequence[int | None]) -> list[int]:
    """Numbers of experts below the fewest of any layer with a router."""
    least = min((count for count in counts if count is not None), default=0)
    return [number for number in NUMBERS if number < least]

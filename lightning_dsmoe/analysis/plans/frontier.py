"""Many plans of one model, and those worth having: the frontier of loss against active share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from lightning_dsmoe import routing
from lightning_dsmoe.analysis.evaluation import PlanResult, evaluate, measured
from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.analysis.measured import SampleLoss
from lightning_dsmoe.routing import SelectionPlan, routed_layers
from lightning_dsmoe.routing.routing import Kind

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


def sweep(
    model: nn.Module, data: HeldOut | Iterable[Any], loss: SampleLoss | None = None, **options: Any
) -> dict[str, PlanResult]:
    """Measure loss and active share of a model under some forty plans, those of `sweep_plans`.

    Args:
        model: a `SparseModel`; or, with `loss`, any model with routed layers.
        data: the text; or, with `loss`, batches, such as a `DataLoader`.
        loss: gives the loss of every sample of a batch, `[B]`, called as `loss(model, batch)`.
        options: `mask` and `outside` of `MeasuredBatches`, or `counts` of `MeasuredText`.

    Returns:
        Results by the names of the plans, which `frontier` and `knee` choose from.

    Raises:
        FloatingPointError: as `evaluate_plan` does.
        TypeError: as `evaluate_plan` does.
        ValueError: as `evaluate_plan` does.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly
        >>> from lightning_dsmoe.analysis import sweep
        >>> model = nn.Sequential(nn.Linear(4, 8), OutputOnly(MixtureOfExperts(8, 4, 16)))
        >>> def loss(model, batch):
        ...     x, label = batch
        ...     return nn.functional.cross_entropy(model(x), label, reduction="none")
        >>> batches = [(torch.randn(6, 4), torch.randint(8, (6,))) for _ in range(3)]
        >>> results = sweep(model, batches, loss)
        >>> results["all"].active_share_mean, results["top 1 and 1"].active_share_mean < 0.5
        (1.0, True)
    """
    on = measured(model, data, loss, **options)
    return {name: evaluate(on, plan) for name, plan in sweep_plans(model).items()}


def sweep_plans(model: nn.Module) -> dict[str, SelectionPlan]:
    """Some forty uniform plans: dense, top-k, thresholds and top-p.

    The same kind of selection runs in feed-forward and attention experts; then top-k in one of the
    two, while all experts of the other run.

    Args:
        model: any model; layers without a router run whole.

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
        >>> plans["threshold 0.5"].experts.eps
        0.5
    """
    layers = routed_layers(model).values()
    n_experts, n_attention = (
        [layer.n_experts for layer in layers if layer.kind == kind] for kind in get_args(Kind)
    )
    plans = {"all": SelectionPlan()}

    def add(name: str, experts: routing.Selection, attention: routing.Selection) -> None:
        plans[name] = SelectionPlan(experts=experts, attention=attention)

    few, few_heads = _numbers(n_experts), _numbers(n_attention)
    for place, k in enumerate(few):
        k_heads = few_heads[min(place, len(few_heads) - 1)] if few_heads else 1
        add(f"top {k} and {k_heads}", routing.TopK(k), routing.TopK(k_heads))
    least = min(n_experts + n_attention, default=0)
    for eps in (eps for eps in EPS if eps < least):
        add(f"threshold {eps:g}", routing.Threshold(eps), routing.Threshold(eps))
        add(f"threshold top-k {eps:g}", routing.ThresholdTopK(eps), routing.ThresholdTopK(eps))
    for p in P:
        add(f"top-p {p:g}", routing.TopP(p), routing.TopP(p))
    for k in few if few_heads else ():  # or else the plans of above once more
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
    # Its name is in the legend: near the knee, where points are dense, a label would cover some.
    label = f"knee: {names[number]}, {points[number][0]:.1f} % active"
    x, y = points[number]
    axes.scatter(x, y, s=110, facecolors="none", edgecolors="black", label=label, zorder=3)
    axes.set(xlabel="active share of the hidden parameters, %", ylabel="loss, nats per token")
    axes.set(xlim=(0, 103))
    axes.legend()
    return figure


def _numbers(counts: Sequence[int]) -> list[int]:
    """Numbers of experts below the fewest of any layer."""
    least = min(counts, default=0)
    return [number for number in NUMBERS if number < least]

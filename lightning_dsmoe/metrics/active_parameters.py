"""The share of the hidden parameters that a token runs through.

Shapes: N tokens, E experts; leading dimensions (tokens) are free.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dsmoe.decoder import Decoder, Routings
from lightning_dsmoe.metrics.parameter_counts import ParameterCounts
from lightning_dsmoe.routing import Routing, Selection, SelectionPlan
from lightning_dsmoe.routing.removed import running_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

BINS = 1000
"""Quantiles are rounded to 1 / BINS of the hidden parameters."""

Masks = Sequence[Tensor | None]


class ActiveShare(NamedTuple):
    """Share of the hidden parameters that run for a token, over some tokens; 0 without tokens.

    The mean is exact, the quantiles are rounded to 0.1 % of the hidden parameters.
    """

    mean: Tensor
    p50: Tensor
    p95: Tensor


def active_masks(
    routings: Routings, plan: SelectionPlan, decoder: Decoder | None = None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The experts that run under a plan: for each layer bool `[..., E]`, None without a router.

    Args:
        routings: what the routers say.
        plan: the plan.
        decoder: whose routers they are, if some of its experts may have been removed.

    Returns:
        The masks of the feed-forward experts and those of the attention experts.
    """

    def masks(
        layers: Sequence[Routing | None], selections: Sequence[Selection], part: str
    ) -> list[Tensor | None]:
        mixtures = [None] * len(layers)
        if decoder is not None:
            mixtures = [getattr(block, part) for block in decoder.blocks]
        return [
            None
            if routing is None
            else running_mask(selection, routing, getattr(mixture, "remaining", None))
            for routing, selection, mixture in zip(layers, selections, mixtures, strict=True)
        ]

    return (
        masks(routings.experts, plan.experts, "feed_forward"),
        masks(routings.attention, plan.attention, "attention"),
    )


def active_parameters(
    counts: ParameterCounts, experts: Masks, attention: Masks, mask: Tensor
) -> ActiveShare:
    """Share of the hidden parameters that run for a token.

    Args:
        counts: parameters of the decoder, from `count_parameters`.
        experts: for each layer the feed-forward experts that run, bool `[..., E]`, or None.
        attention: the same for the attention experts; `active_masks` gives both.
        mask: tokens that count, bool `[...]`.

    Raises:
        ValueError: if the masks do not fit the decoder.
    """
    return _compute(*_update(counts, experts, attention, mask), counts.hidden)


class ActiveParameters(Metric):
    """Share of the hidden parameters that run for a token, over batches and over ranks.

    Args:
        counts: parameters of the decoder, from `count_parameters`.
        **options: those of every torchmetrics `Metric`, such as `sync_on_compute=False` for a
            metric that only one rank computes.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    active: Tensor
    histogram: Tensor

    def __init__(self, counts: ParameterCounts, **options: Any) -> None:
        super().__init__(**options)
        self.counts = counts
        self.add_state("active", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(BINS + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, experts: Masks, attention: Masks, mask: Tensor) -> None:
        """Count tokens; arguments and errors are those of `active_parameters`."""
        active, histogram = _update(self.counts, experts, attention, mask)
        self.active += active
        self.histogram += histogram

    def compute(self) -> ActiveShare:
        """Share over all tokens counted since the last reset."""
        return _compute(self.active, self.histogram, self.counts.hidden)

    def plot(
        self, val: ActiveShare | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | SubFigure, Axes]":
        """Histogram of the share over tokens, with its mean and 95th percentile.

        Args:
            val: mean and percentile to mark; None marks what `compute` gives.
            ax: axes to draw on; None makes a figure.
        """
        from matplotlib.figure import Figure

        share = self.compute() if val is None else val
        axes = Figure(layout="constrained").subplots() if ax is None else ax
        bins = torch.arange(BINS + 1) / BINS
        axes.bar(bins.tolist(), self.histogram.tolist(), width=2 / BINS)
        axes.axvline(share.mean.item(), color="black", label=f"mean {share.mean.item():.1%}")
        axes.axvline(share.p95.item(), color="black", linestyle="--", label="95th percentile")
        axes.set(xlabel="active share of the hidden parameters", ylabel="tokens", xlim=(0, 1))
        axes.legend()
        return axes.figure, axes


def _update(
    counts: ParameterCounts, experts: Masks, attention: Masks, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the parameters that run over tokens, and a histogram of their share."""
    active = torch.full(mask.shape, counts.always, dtype=torch.int64, device=mask.device)
    for kind, layers, masks in (
        ("experts", counts.experts, experts),
        ("attention", counts.attention, attention),
    ):
        if len(layers) != len(masks):
            raise ValueError(f"{kind}: masks of {len(masks)} layers, a decoder of {len(layers)}")
        for layer, (routed, running) in enumerate(zip(layers, masks, strict=True)):
            if routed is None:
                continue
            shape = (*mask.shape, routed.n_experts)
            if running is None or running.shape != shape:
                got = None if running is None else tuple(running.shape)
                raise ValueError(f"{kind}, layer {layer}: a mask of shape {shape}, got {got}")
            active += running.sum(-1) * routed.per_expert
    active_N = active[mask.bool()]
    hidden = max(counts.hidden, 1)
    bins_N = (active_N * BINS + hidden // 2) // hidden
    return active_N.sum(), bins_N.bincount(minlength=BINS + 1)


def _compute(active: Tensor, histogram: Tensor, hidden: int) -> ActiveShare:
    tokens = histogram.sum()
    below = histogram.cumsum(0)

    def quantile(percent: int) -> Tensor:
        return (100 * below < percent * tokens).sum() / BINS

    return ActiveShare(active / tokens.clamp_min(1) / max(hidden, 1), quantile(50), quantile(95))

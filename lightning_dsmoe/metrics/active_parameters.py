"""The active share: how many of the hidden parameters run for a token.

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
"""Quantiles are rounded to 1 / BINS, so that ranks can add up histograms instead of all tokens."""

Masks = Sequence[Tensor | None]


class ActiveShare(NamedTuple):
    """Share of the hidden parameters that run for a token, over some tokens; 0 without tokens.

    Args:
        mean: scalar, mean over the tokens, exact.
        p50: scalar, median over the tokens, rounded to 0.001.
        p95: scalar, 95th percentile over the tokens, rounded to 0.001.
    """

    mean: Tensor
    p50: Tensor
    p95: Tensor


def active_masks(
    routings: Routings, plan: SelectionPlan, decoder: Decoder | None = None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The experts that run for each token under a plan.

    Args:
        routings: routings of a forward pass, one per layer.
        plan: which experts run.
        decoder: the decoder of the routings; needed only if experts were removed from it, as those
            never run.

    Returns:
        Two lists, of the feed-forward and of the attention experts: for each layer bool `[..., E]`,
        or None where it has no router.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.decoder import Routings
        >>> from lightning_dsmoe.metrics import active_masks
        >>> from lightning_dsmoe.routing import Routing, SelectionPlan, TopK
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
        >>> routings = Routings(experts=(Routing(logits, logits.softmax(-1)),), attention=(None,))
        >>> active_masks(routings, SelectionPlan.uniform(1, experts=TopK(2)))
        ([tensor([[ True,  True, False]])], [None])
    """

    def masks(
        layers: Sequence[Routing | None], selections: Sequence[Selection], part: str
    ) -> list[Tensor | None]:
        blocks = [None] * len(layers) if decoder is None else decoder.blocks
        remaining = [getattr(getattr(block, part, None), "remaining", None) for block in blocks]
        return [
            None if routing is None else running_mask(selection, routing, rest)
            for routing, selection, rest in zip(layers, selections, remaining, strict=True)
        ]

    return (
        masks(routings.experts, plan.experts, "feed_forward"),
        masks(routings.attention, plan.attention, "attention"),
    )


def active_parameters(
    counts: ParameterCounts, experts: Masks, attention: Masks, mask: Tensor
) -> ActiveShare:
    """Active share: share of the hidden parameters that run for a token, over a batch.

    active share = (always + sum_l n_l p_l) / hidden, with n_l the number of experts of layer l that
    run for the token and p_l the parameters of one of them.

    Args:
        counts: parameter counts of the decoder, from `count_parameters`.
        experts: feed-forward experts that run, for each layer bool `[..., E]`, or None.
        attention: attention experts that run, likewise; `active_masks` returns both.
        mask: tokens that count, bool `[...]`.

    Returns:
        Mean, median and 95th percentile over the tokens, from 0 to 1.

    Raises:
        ValueError: if the number or shape of the masks does not match the decoder.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.metrics import (
        ...     ParameterCounts, RoutedParameters, active_parameters
        ... )
        >>> counts = ParameterCounts(
        ...     outside=100, always=20, experts=(RoutedParameters(4, 20),), attention=(None,)
        ... )
        >>> runs = torch.tensor([[True, True, False, False], [True, False, False, False]])
        >>> share = active_parameters(counts, [runs], [None], torch.ones(2, dtype=torch.bool))
        >>> share.mean, share.p95
        (tensor(0.5000), tensor(0.6000))
    """
    return _compute(*_update(counts, experts, attention, mask), counts.hidden)


class ActiveParameters(Metric):
    """Active share: share of the hidden parameters that run for a token, over batches and ranks.

    `update` takes the masks of the experts that run and of the tokens that count; `compute` returns
    an `ActiveShare` over all tokens since the last reset. `active_parameters` is the function for
    one batch, with the formula.

    Args:
        counts: parameter counts of the decoder, from `count_parameters`.
        **options: options of every torchmetrics `Metric`, such as `sync_on_compute=False` for a
            metric that only one rank computes.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe.metrics import ActiveParameters, active_masks, count_parameters
        >>> from lightning_dsmoe.routing import SelectionPlan, TopK
        >>> decoder = Decoder(
        ...     vocab_size=50,
        ...     d_model=16,
        ...     n_layers=2,
        ...     attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=8),
        ...     feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=64),
        ... )
        >>> plan = SelectionPlan.uniform(2, experts=TopK(1), attention=TopK(1))
        >>> metric = ActiveParameters(count_parameters(decoder))
        >>> for tokens in torch.randint(50, (3, 4, 8)):  # 3 batches of 4 sequences
        ...     routings = decoder(tokens, plan).routings
        ...     metric.update(*active_masks(routings, plan), torch.ones(4, 8, dtype=torch.bool))
        >>> f"{metric.compute().mean:.1%} of the hidden parameters run for a token"
        '29.6% of the hidden parameters run for a token'
    """

    is_differentiable = False
    full_state_update = False

    active: Tensor
    histogram: Tensor

    def __init__(self, counts: ParameterCounts, **options: Any) -> None:
        super().__init__(**options)
        self.counts = counts
        self.add_state("active", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(BINS + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, experts: Masks, attention: Masks, mask: Tensor) -> None:
        """Add the tokens of a batch.

        Args:
            experts: feed-forward experts that run, for each layer bool `[..., E]`, or None.
            attention: attention experts that run, likewise.
            mask: tokens that count, bool `[...]`.

        Raises:
            ValueError: if the number or shape of the masks does not match the decoder.
        """
        active, histogram = _update(self.counts, experts, attention, mask)
        self.active += active
        self.histogram += histogram

    def compute(self) -> ActiveShare:
        """Active share over all tokens since the last reset."""
        return _compute(self.active, self.histogram, self.counts.hidden)

    def plot(
        self, val: ActiveShare | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | SubFigure, Axes]":
        """Draw the histogram of the active share over tokens, with mean and 95th percentile.

        Args:
            val: active share to mark; None marks that of `compute`.
            ax: axes to draw on; None makes a figure.

        Returns:
            The figure and its axes.
        """
        from matplotlib.figure import Figure

        share = self.compute() if val is None else val
        axes = Figure(layout="constrained").subplots() if ax is None else ax
        bins = torch.arange(BINS + 1) / BINS
        axes.bar(bins.tolist(), self.histogram.tolist(), width=2 / BINS)
        axes.axvline(
            share.mean.item(), color="black", label=f"mean {100 * share.mean.item():.3g} %"
        )
        axes.axvline(share.p95.item(), color="black", linestyle="--", label="95th percentile")
        axes.set(xlabel="active share (of the hidden parameters)", ylabel="tokens", xlim=(0, 1))
        axes.legend()
        return axes.figure, axes


def _update(
    counts: ParameterCounts, experts: Masks, attention: Masks, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Parameters that run, summed over tokens, and the histogram of the active share."""
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

"""The active share over batches and ranks.

Shapes: E experts; leading dimensions (tokens) are free.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dsmoe.metrics.active_parameters import (
    BINS,
    ActiveShare,
    Masks,
    active_counts,
    share_of_counts,
)
from lightning_dsmoe.metrics.parameter_counts import ParameterCounts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class ActiveParameters(Metric):
    """Active share: share of the hidden parameters that run for a token, over batches and ranks.

    `update` takes the masks of the experts that run and of the tokens that count; `compute` returns
    an `ActiveShare` over all tokens since the last reset. `active_parameters` is the function for
    one batch, with the formula.

    Args:
        counts: parameter counts of the model, from `count_parameters`.
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
        >>> plan = SelectionPlan(experts=TopK(1), attention=TopK(1))
        >>> metric = ActiveParameters(count_parameters(decoder))
        >>> for tokens in torch.randint(50, (3, 4, 8)):  # 3 batches of 4 sequences
        ...     routings = decoder(tokens, plan).routings
        ...     metric.update(active_masks(routings, plan))
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

    def update(self, active: Masks, mask: Tensor | None = None) -> None:
        """Add the tokens of a batch.

        Args:
            active: the experts that run, for each routed layer bool `[..., E]`, by name.
            mask: tokens that count, bool `[...]`; None counts all.

        Raises:
            ValueError: if the names or shapes of the masks do not match the model.
        """
        parameters, histogram = active_counts(self.counts, active, mask)
        self.active += parameters
        self.histogram += histogram

    def compute(self) -> ActiveShare:
        """Active share over all tokens since the last reset."""
        return share_of_counts(self.active, self.histogram, self.counts.hidden)

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

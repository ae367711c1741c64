"""The active share: how many of the hidden parameters run for a token.

Shapes: N tokens, E experts; leading dimensions (tokens) are free.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dsmoe.imports import imported_on_use
from lightning_dsmoe.metrics.parameter_counts import ParameterCounts
from lightning_dsmoe.routing import Routings, SelectionPlan, routed_layers
from lightning_dsmoe.routing.removed import running_mask

__getattr__ = imported_on_use(__name__, ActiveParameters="metrics.active_parameters_metric")

BINS = 1000
"""Quantiles are rounded to 1 / BINS, so that ranks can add up histograms instead of all tokens."""

Masks = Mapping[str, Tensor]
"""The experts of each routed layer that run for each token, bool `[..., E]`, by name."""


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
    routings: Routings, plan: SelectionPlan, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """The experts that run for each token of a decoder under a plan.

    For any other model, `record_routings` records them: `RoutingRecord.active_masks`.

    Args:
        routings: routings of a forward pass, as a `Decoder` returns them.
        plan: which experts run.
        model: the decoder of the routings; needed only if experts were removed from it, as those
            never run.

    Returns:
        For each routed layer bool `[..., E]`, by its name in the decoder.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.metrics import active_masks
        >>> from lightning_dsmoe.routing import Routing, Routings, SelectionPlan, TopK
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
        >>> routings = Routings(experts=(Routing(logits, logits.softmax(-1)),), attention=(None,))
        >>> active_masks(routings, SelectionPlan(experts=TopK(2)))
        {'blocks.0.feed_forward': tensor([[ True,  True, False]])}
    """
    layers = routings.by_name()
    routed = {} if model is None else routed_layers(model)
    return {
        name: running_mask(
            selection, layers[name].routing, routed[name].remaining if name in routed else None
        )
        for name, selection in plan.selections(layers).items()
    }


def active_parameters(
    counts: ParameterCounts, active: Masks, mask: Tensor | None = None
) -> ActiveShare:
    """Active share: share of the hidden parameters that run for a token, over a batch.

    active share = (always + sum_l n_l p_l) / hidden, with n_l the number of experts of layer l that
    run for the token and p_l the parameters of one of them.

    Args:
        counts: parameter counts of the model, from `count_parameters`.
        active: the experts that run, for each routed layer bool `[..., E]`, by name, such as those
            of `RoutingRecord.active_masks`.
        mask: tokens that count, bool `[...]`; None counts all.

    Returns:
        Mean, median and 95th percentile over the tokens, from 0 to 1.

    Raises:
        ValueError: if the names or shapes of the masks do not match the model.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.metrics import (
        ...     ParameterCounts, RoutedParameters, active_parameters
        ... )
        >>> counts = ParameterCounts(
        ...     outside=100, always=20, layers={"mlp": RoutedParameters(n_experts=4, per_expert=20)}
        ... )
        >>> runs = torch.tensor([[True, True, False, False], [True, False, False, False]])
        >>> share = active_parameters(counts, {"mlp": runs})
        >>> share.mean, share.p95
        (tensor(0.5000), tensor(0.6000))
    """
    return share_of_counts(*active_counts(counts, active, mask), counts.hidden)


def active_counts(
    counts: ParameterCounts, active: Masks, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Parameters that run, summed over tokens, and the histogram of the active share."""
    if active.keys() != counts.layers.keys():
        given, routed_layers = (", ".join(names) or "no layer" for names in (active, counts.layers))
        raise ValueError(f"masks of {given}, a model with {routed_layers}")
    if mask is None:
        if not active:
            raise ValueError("a model without routed layers needs a mask of the tokens that count")
        first = next(iter(active.values()))
        mask = first.new_ones(first.shape[:-1])
    parameters = torch.full(mask.shape, counts.always, dtype=torch.int64, device=mask.device)
    for name, routed in counts.layers.items():
        running, shape = active[name], (*mask.shape, routed.n_experts)
        if running.shape != shape:
            raise ValueError(f"{name}: a mask of shape {shape}, got {tuple(running.shape)}")
        parameters += running.sum(-1) * routed.per_expert
    parameters_N = parameters[mask.bool()]
    hidden = max(counts.hidden, 1)
    bins_N = (parameters_N * BINS + hidden // 2) // hidden
    return parameters_N.sum(), bins_N.bincount(minlength=BINS + 1)


class ActiveSums:
    """The active share over batches in one process, without torchmetrics.

    `ActiveParameters` is the same over ranks, in seconds more to start.

    Args:
        counts: parameter counts of the model, from `count_parameters`.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.metrics import ActiveSums, ParameterCounts, RoutedParameters
        >>> layers = {"mlp": RoutedParameters(n_experts=4, per_expert=20)}
        >>> sums = ActiveSums(ParameterCounts(outside=100, always=20, layers=layers))
        >>> for n_experts in (1, 3):
        ...     sums.add({"mlp": (torch.arange(4) < n_experts).expand(5, 4)})
        >>> sums.share().mean
        tensor(0.6000)
    """

    def __init__(self, counts: ParameterCounts) -> None:
        self.counts = counts
        self.active = torch.zeros((), dtype=torch.int64)
        self.histogram = torch.zeros(BINS + 1, dtype=torch.int64)

    def add(self, active: Masks, mask: Tensor | None = None) -> None:
        """Add the tokens of a batch (see `active_parameters`)."""
        parameters, histogram = active_counts(self.counts, active, mask)
        self.active += parameters.cpu()
        self.histogram += histogram.cpu()

    def share(self) -> ActiveShare:
        """Active share over all tokens that were added."""
        return share_of_counts(self.active, self.histogram, self.counts.hidden)


def share_of_counts(active: Tensor, histogram: Tensor, hidden: int) -> ActiveShare:
    """The active share from sums of what `active_counts` gives."""
    tokens = histogram.sum()
    below = histogram.cumsum(0)

    def quantile(percent: int) -> Tensor:
        return (100 * below < percent * tokens).sum() / BINS

    return ActiveShare(active / tokens.clamp_min(1) / max(hidden, 1), quantile(50), quantile(95))

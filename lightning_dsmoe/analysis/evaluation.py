"""A model under a plan: its loss and what it costs."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import stdev
from typing import Any, NamedTuple

from torch import nn

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.analysis.measured import (
    Measured,
    MeasuredBatches,
    MeasuredText,
    SampleLoss,
)
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.metrics import ActiveSums, ParameterCounts
from lightning_dsmoe.moved import renamed_attributes
from lightning_dsmoe.routing import SelectionPlan


class Gain(NamedTuple):
    """How much lower a loss is than another, summed over the tokens of a text or over samples.

    Args:
        total: the other loss less this one.
        error: its standard error, from how much the windows of the text differ; 0 of one window.
    """

    total: float
    error: float

    @classmethod
    def between(cls, losses: Sequence[float], others: Sequence[float]) -> "Gain":
        """The gain of `losses` over `others`, both of the same windows in order."""
        gains = [b - a for a, b in zip(losses, others, strict=True)]
        # Paired by window: hard and easy windows differ far more than two plans on one window do.
        error = stdev(gains) * len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return cls(sum(gains), error)

    @property
    def is_clear(self) -> bool:
        """Whether the gain exceeds its standard error; of a single window any gain is enough."""
        return self.total > self.error


@renamed_attributes(
    share="active_share_mean", share_p50="active_share_p50", share_p95="active_share_p95"
)
class PlanResult(NamedTuple):
    """A model under one plan, measured on a text or on batches of anything.

    Args:
        loss: cross entropy, in nats per token; or the mean of one's own loss over samples.
        active_share_mean: mean share of the hidden parameters that run for a token; embeddings and
            the head are not among them.
        active_share_p50: its median over tokens.
        active_share_p95: its 95th percentile.
        tokens_per_second: speed of reading the text and taking its loss; of batches that of
            samples.
        window_losses: cross entropy of each window of the text, summed over its tokens; or the loss
            of each sample.

    Examples:
        >>> dense = PlanResult(1.5, 1.0, 1.0, 1.0, 900.0, window_losses=(3.0, 3.0))
        >>> sparse = PlanResult(1.6, 0.3, 0.3, 0.4, 1800.0, window_losses=(3.1, 3.3))
        >>> f"{sparse.loss / dense.loss - 1:+.1%} at {sparse.active_share_mean:.0%} active"
        '+6.7% at 30% active'
        >>> sparse.clearly_below(dense), dense.clearly_below(sparse)
        (False, True)
    """

    loss: float
    active_share_mean: float
    active_share_p50: float
    active_share_p95: float
    tokens_per_second: float
    window_losses: tuple[float, ...]

    def gain_over(self, other: "PlanResult") -> Gain:
        """How much lower the loss is than that of another plan on the same text."""
        return Gain.between(self.window_losses, other.window_losses)

    def clearly_below(self, other: "PlanResult") -> bool:
        """Whether the loss is lower than that of another plan by more than a standard error."""
        return self.gain_over(other).is_clear


class Found(NamedTuple):
    """A plan, and what was measured of it on the text that it was found on."""

    plan: SelectionPlan
    result: PlanResult


Measure = Callable[[SelectionPlan], PlanResult]
"""Evaluates plans of one model on one text."""


def evaluate_plan(
    model: nn.Module,
    plan: SelectionPlan,
    data: HeldOut | Iterable[Any],
    counts: ParameterCounts | None = None,
    *,
    loss: SampleLoss | None = None,
    **options: Any,
) -> PlanResult:
    """Measure a model under a plan: a language model on a text, any other by a loss of your own.

    Args:
        model: a `SparseModel`; or, with `loss`, any model with routed layers.
        plan: the experts that run.
        data: the text; or, with `loss`, batches, such as a `DataLoader`.
        counts: parameters of the decoder before it was packed; None counts them.
        loss: gives the loss of every sample of a batch, `[B]`, called as `loss(model, batch)`.
        options: `mask` and `outside` of `MeasuredBatches`.

    Returns:
        Loss, active share and speed.

    Raises:
        FloatingPointError: if the loss is not a finite number.
        TypeError: without a loss, unless the model is a `SparseModel` and the data its text.
        ValueError: if there is no batch, the model has no routed layer, the plan does not fit it,
            or the loss is not one of every sample.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly, SelectionPlan, TopK
        >>> from lightning_dsmoe.analysis import evaluate_plan
        >>> model = nn.Sequential(nn.Linear(4, 8), OutputOnly(MixtureOfExperts(8, 4, 16)))
        >>> def loss(model, batch):
        ...     x, label = batch
        ...     return nn.functional.cross_entropy(model(x), label, reduction="none")
        >>> batches = [(torch.randn(6, 4), torch.randint(8, (6,))) for _ in range(3)]
        >>> result = evaluate_plan(model, SelectionPlan(experts=TopK(1)), batches, loss=loss)
        >>> len(result.window_losses), 0 < result.active_share_mean < 0.5
        (18, True)
    """
    options |= {} if counts is None else {"counts": counts}
    return evaluate(measured(model, data, loss, **options), plan)


def measured(
    model: nn.Module,
    data: HeldOut | Iterable[Any],
    loss: SampleLoss | None = None,
    **options: Any,
) -> Measured:
    """A language model on a text or, with a loss, any model on batches, as `evaluate_plan` has it.

    Args:
        model: the model.
        data: the text, or batches.
        loss: gives the loss of every sample of a batch.
        options: those of `MeasuredText` or `MeasuredBatches`.
    """
    if loss is not None:
        return MeasuredBatches(model, data, loss, **options)
    if not isinstance(model, SparseModel) or not isinstance(data, HeldOut):
        raise TypeError(
            "a SparseModel is measured on a HeldOut text, any other model needs "
            f"loss=function(model, batch); got {type(model).__name__} and {type(data).__name__}"
        )
    return MeasuredText(model, data, **options)


def evaluate(on: Measured, plan: SelectionPlan) -> PlanResult:
    """Measure a model on data under a plan."""
    active = ActiveSums(on.counts)
    losses: list[float] = []
    seconds, n_counted = 0.0, 0
    for reading in on.read(plan):
        losses += reading.losses
        n_counted += reading.n_counted
        seconds += reading.seconds
        masks = reading.active()
        if not masks and reading.mask is None:  # nothing says which tokens there were
            raise ValueError("no routed layer was called, so there is no active share")
        active.add(masks, reading.mask)
    if not n_counted:
        raise ValueError("there is no token or sample to measure a loss on")
    loss = sum(losses) / n_counted
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    mean, p50, p95 = (share.item() for share in active.share())
    return PlanResult(loss, mean, p50, p95, n_counted / seconds, tuple(losses))

"""A model under a plan: its loss and what it costs.

Shapes: B sequences in a batch, T positions, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Sequence
from statistics import stdev
from typing import NamedTuple

import torch

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.losses.cross_entropy import window_cross_entropy
from lightning_dsmoe.metrics import ActiveParameters, ParameterCounts, active_masks
from lightning_dsmoe.moved import renamed_attributes
from lightning_dsmoe.routing import SelectionPlan


class Gain(NamedTuple):
    """How much lower a loss is than another, summed over the tokens of a text, in nats.

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
    """A model under one plan, measured on a text.

    Args:
        loss: cross entropy, in nats per token.
        active_share_mean: mean share of the hidden parameters that run for a token; embeddings and
            the head are not among them.
        active_share_p50: its median over tokens.
        active_share_p95: its 95th percentile.
        tokens_per_second: speed of reading the text and taking its loss.
        window_losses: cross entropy of each window of the text, summed over its tokens.

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


@torch.inference_mode()
def evaluate_plan(
    model: SparseModel, plan: SelectionPlan, text: HeldOut, counts: ParameterCounts
) -> PlanResult:
    """Measure a model under a plan.

    Args:
        model: the model.
        plan: the experts that run.
        text: what to measure it on.
        counts: parameters of the decoder before it was packed, from `count_parameters`.

    Returns:
        Loss, active share and speed.

    Raises:
        FloatingPointError: if the loss is not a finite number.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe import SelectionPlan, TopK, compile_sparse
        >>> from lightning_dsmoe.analysis import HeldOut, evaluate_plan
        >>> from lightning_dsmoe.metrics import count_parameters
        >>> decoder = Decoder(
        ...     256,
        ...     16,
        ...     2,
        ...     attention=partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8),
        ...     feed_forward=partial(MixtureOfExperts, n_experts=8, d_expert=4),
        ... )
        >>> plan = SelectionPlan.uniform(2, experts=TopK(2))
        >>> tokens = torch.arange(64).view(2, 32)
        >>> text = HeldOut([(tokens, tokens + 1)], n_tokens=64)
        >>> model = compile_sparse(decoder, plan)
        >>> result = evaluate_plan(model, plan, text, count_parameters(decoder))
        >>> 0 < result.active_share_mean < 1, len(result.window_losses)
        (True, 2)
    """
    active = ActiveParameters(counts, sync_on_compute=False).to(text.device)  # one rank measures
    nll: list[float] = []
    seconds = 0.0
    for inputs_BT, labels_BT in text.batches:
        start = time.perf_counter()
        logits_BTV, routings = model(inputs_BT, plan)
        nll += window_cross_entropy(logits_BTV, labels_BT).tolist()
        seconds += time.perf_counter() - start
        active.update(*active_masks(routings, plan, model.decoder), labels_BT != IGNORED)
    loss = sum(nll) / text.n_tokens
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    mean, p50, p95 = (share.item() for share in active.compute())
    return PlanResult(loss, mean, p50, p95, text.n_tokens / seconds, tuple(nll))

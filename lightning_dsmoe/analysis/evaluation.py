"""A model under a plan: its loss and what it costs.

Shapes: B windows, T tokens, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from statistics import stdev
from typing import NamedTuple

import torch

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.losses.cross_entropy import window_cross_entropy
from lightning_dsmoe.metrics import ActiveParameters, ParameterCounts, active_masks
from lightning_dsmoe.moved import old_attributes
from lightning_dsmoe.routing import SelectionPlan


class Gain(NamedTuple):
    """How much lower a loss is than another, summed over the tokens of a text, in nats.

    Args:
        total: the other loss less this one.
        error: its standard error, from how much the windows of the text differ; 0 of one window.
    """

    total: float
    error: float


@old_attributes(
    share="active_share_mean", share_p50="active_share_p50", share_p95="active_share_p95"
)
class PlanResult(NamedTuple):
    """A model under one plan.

    Args:
        loss: cross entropy, in nats per token.
        active_share_mean: mean share of the hidden parameters that run for a token; embeddings and
            the head are not among them.
        active_share_p50: its median over tokens.
        active_share_p95: its 95th percentile.
        tokens_per_second: speed of reading the text and taking its loss.
        window_losses: cross entropy of each window of the text, summed over its tokens.
    """

    loss: float
    active_share_mean: float
    active_share_p50: float
    active_share_p95: float
    tokens_per_second: float
    window_losses: tuple[float, ...]

    def gain_over(self, other: "PlanResult") -> Gain:
        """How much lower the loss is than that of another plan on the same text."""
        gains = [b - a for a, b in zip(self.window_losses, other.window_losses, strict=True)]
        error = stdev(gains) * len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return Gain(sum(gains), error)

    def clearly_below(self, other: "PlanResult") -> bool:
        """Whether the loss is lower than that of another plan by more than a standard error.

        Of a single window any lower loss is enough.
        """
        total, error = self.gain_over(other)
        return total > error


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

    Raises:
        FloatingPointError: if the loss is not a finite number.
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
    share = active.compute()
    return PlanResult(
        loss,
        share.mean.item(),
        share.p50.item(),
        share.p95.item(),
        text.n_tokens / seconds,
        tuple(nll),
    )

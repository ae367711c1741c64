"""A model under a plan: its loss and what it costs.

Shapes: B windows, T tokens, V vocabulary.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.losses.cross_entropy import summed_cross_entropy
from lightning_dsmoe.metrics import ActiveParameters, ParameterCounts, active_masks
from lightning_dsmoe.routing import SelectionPlan


class PlanResult(NamedTuple):
    """A model under one plan.

    Args:
        loss: cross entropy, in nats per token.
        share: mean share of the hidden parameters that run for a token; embeddings and the head
            are not among them.
        share_p50: its median over tokens.
        share_p95: its 95th percentile.
        tokens_per_second: speed of reading the text.
    """

    loss: float
    share: float
    share_p50: float
    share_p95: float
    tokens_per_second: float


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
    """
    active = ActiveParameters(counts)
    nll, seconds = 0.0, 0.0
    for inputs_BT, labels_BT in text.batches:
        start = time.perf_counter()
        logits_BTV, routings = model(inputs_BT, plan)
        seconds += time.perf_counter() - start
        nll += summed_cross_entropy(logits_BTV, labels_BT).item()
        active.update(*active_masks(routings, plan, model.decoder), labels_BT != IGNORED)
    share = active.compute()
    return PlanResult(
        nll / text.n_tokens,
        share.mean.item(),
        share.p50.item(),
        share.p95.item(),
        text.n_tokens / seconds,
    )

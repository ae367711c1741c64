"""How far a plan's predictions are from those of all experts.

Shapes: B sequences in a batch, T positions, V vocabulary, P probable tokens.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.routing import SelectionPlan

Diverge = Callable[[SelectionPlan], tuple[float, ...]]
"""The divergence of each window under a plan, summed over its tokens, in nats."""


@torch.inference_mode()
def divergence(model: SparseModel, text: HeldOut, *, n_probable: int = 64) -> Diverge:
    """Keep what a model predicts with all experts, to compare plans with.

    KL(p || q) = sum over tokens v of p_v ln(p_v / q_v), p of all experts and q of the plan, over
    the tokens that are most probable under p, and all others as one. Where p is right it is the
    increase of the expected loss, but it needs no next token, so it varies less from text to
    text than the loss does (docs/lab_notes/plans.md). Whole distributions of a large vocabulary
    would fill the memory.

    Args:
        model: the model.
        text: the text.
        n_probable: tokens of the vocabulary that are distinguished at each position.

    Returns:
        A function that gives the divergence of each window under a plan.
    """
    dense = SelectionPlan()
    predictions = [
        _most_probable(model(inputs_BT, dense).logits, n_probable) for inputs_BT, _ in text.batches
    ]

    @torch.inference_mode()
    def diverge(plan: SelectionPlan) -> tuple[float, ...]:
        windows: list[float] = []
        for (inputs_BT, labels_BT), (tokens_BTP, log_p_BTP) in zip(
            text.batches, predictions, strict=True
        ):
            log_q_BTV = model(inputs_BT, plan).logits.float().log_softmax(-1)
            log_q_BTP = _with_others(log_q_BTV, tokens_BTP)
            kl_BT = (log_p_BTP.exp() * (log_p_BTP - log_q_BTP)).sum(-1)
            windows += (kl_BT * (labels_BT != IGNORED)).sum(-1).tolist()
        return tuple(windows)

    return diverge


def _most_probable(logits_BTV: Tensor, n_probable: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens and their log-probabilities, with that of all others behind."""
    log_p_BTV = logits_BTV.float().log_softmax(-1)
    tokens_BTP = log_p_BTV.topk(min(n_probable, log_p_BTV.shape[-1])).indices
    return tokens_BTP, _with_others(log_p_BTV, tokens_BTP)


def _with_others(log_p_BTV: Tensor, tokens_BTP: Tensor) -> Tensor:
    """Log-probabilities of some tokens, with that of all others behind if there are any."""
    log_p_BTP = log_p_BTV.gather(-1, tokens_BTP)
    if log_p_BTP.shape == log_p_BTV.shape:
        return log_p_BTP
    # Not log(1 - sum p): rounding makes that -inf where the probable tokens sum to 1.
    others_BT1 = log_p_BTV.scatter(-1, tokens_BTP, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p_BTP, others_BT1], dim=-1)

"""How far a plan's predictions are from those of all experts.

Shapes: B windows, T tokens, V vocabulary, K tokens that are probable.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.routing import SelectionPlan

PROBABLE = 64
"""Tokens of the vocabulary that are told apart at each place."""

Diverge = Callable[[SelectionPlan], tuple[float, ...]]
"""The divergence of each window under a plan, summed over its tokens, in nats."""


@torch.inference_mode()
def divergence(model: SparseModel, text: HeldOut) -> Diverge:
    """Keep what a model predicts with all experts, to compare plans with.

    KL(p || q) = sum over tokens v of p_v ln(p_v / q_v), p of all experts and q of the plan, over
    the `PROBABLE` tokens that are most probable under p and all others taken together. It varies
    far less from text to text than the loss does, and where p is right it is what a plan adds to
    the loss in the mean.

    Args:
        model: the model.
        text: the text.
    """
    dense = SelectionPlan.uniform(model.decoder.n_layers)
    kept = [_most_probable(model(inputs_BT, dense).logits) for inputs_BT, _ in text.batches]

    @torch.inference_mode()
    def diverge(plan: SelectionPlan) -> tuple[float, ...]:
        found: list[float] = []
        for (inputs_BT, labels_BT), (tokens_BTK, log_p_BTK) in zip(text.batches, kept, strict=True):
            log_q_BTV = model(inputs_BT, plan).logits.float().log_softmax(-1)
            log_q_BTK = _with_others(log_q_BTV, tokens_BTK)
            kl_BT = (log_p_BTK.exp() * (log_p_BTK - log_q_BTK)).sum(-1)
            found += (kl_BT * (labels_BT != IGNORED)).sum(-1).tolist()
        return tuple(found)

    return diverge


def _most_probable(logits_BTV: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable tokens and their log-probabilities, with that of all others behind."""
    log_p_BTV = logits_BTV.float().log_softmax(-1)
    tokens_BTK = log_p_BTV.topk(min(PROBABLE, log_p_BTV.shape[-1])).indices
    return tokens_BTK, _with_others(log_p_BTV, tokens_BTK)


def _with_others(log_p_BTV: Tensor, tokens_BTK: Tensor) -> Tensor:
    """Log-probabilities of some tokens, with that of all others behind if there are any."""
    log_p_BTK = log_p_BTV.gather(-1, tokens_BTK)
    if log_p_BTK.shape == log_p_BTV.shape:
        return log_p_BTK
    others_BT1 = log_p_BTV.scatter(-1, tokens_BTK, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p_BTK, others_BT1], dim=-1)

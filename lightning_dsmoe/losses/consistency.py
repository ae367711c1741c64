"""The loss that keeps two predictions of the same tokens alike.

Shapes: V vocabulary; leading dimensions (tokens) are free; N tokens in one dimension.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_dsmoe.losses.token_sums import flatten_tokens, sum_over_ranks
from lightning_dsmoe.precision import at_least_float32, without_autocast

TOKENS_AT_ONCE = 1024
"""Tokens whose predictions are compared at a time."""


def consistency_loss(
    logits: Tensor,
    others: Tensor,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Symmetric divergence: mean over tokens of (KL(p || q) + KL(q || p)) / 2, p and q predictions.

    Tokens are compared some at a time and once more in the backward pass, for which only the logits
    and the mask are kept.

    Source: R-Drop, arXiv 2106.14448, eq. 2; gradients go into both predictions.

    Args:
        logits: logits of the one, `[..., V]`.
        others: logits of the other, `[..., V]`.
        mask: tokens that count, `[...]`; None counts all. No token counting gives 0.
        group: process group over whose tokens the mean is, as in `mutual_information_loss`.

    Returns:
        A scalar of at least float32, in nats.

    Raises:
        ValueError: if the shapes differ or the mask does not cover the tokens.
    """
    if logits.shape != others.shape:
        raise ValueError(f"logits of shapes {tuple(logits.shape)} and {tuple(others.shape)}")
    _, weight_N = flatten_tokens(logits[..., :1], mask)
    flat = (each.reshape(-1, each.shape[-1]) for each in (logits, others))
    parts = zip(*(each.split(TOKENS_AT_ONCE) for each in (*flat, weight_N)), strict=True)
    with without_autocast(logits.device.type):
        summed = [
            checkpoint(_summed, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        totals = torch.stack([torch.stack(summed).sum(), weight_N.sum()])
        total, count = sum_over_ranks(totals, group).unbind()
        return total / count.clamp_min(1)


def _summed(logits_NV: Tensor, others_NV: Tensor, weight_N: Tensor) -> Tensor:
    log_p_NV, log_q_NV = (at_least_float32(each).log_softmax(-1) for each in (logits_NV, others_NV))
    both_N = ((log_p_NV.exp() - log_q_NV.exp()) * (log_p_NV - log_q_NV)).sum(-1)
    return 0.5 * (weight_N @ both_N)

"""The loss that keeps two predictions of the same tokens alike.

Shapes: V vocabulary; leading dimensions (tokens) are free; N tokens in one dimension.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_dsmoe.losses.token_sums import flatten_tokens, sum_over_ranks
from lightning_dsmoe.moved import renamed_options
from lightning_dsmoe.precision import at_least_float32, without_autocast

CHUNK = 1024
"""Tokens compared at a time: log-probabilities of a whole batch would take several times the memory
of its logits, which a large vocabulary makes the largest tensor of a step."""


@renamed_options(others="other_logits")
def consistency_loss(
    logits: Tensor,
    other_logits: Tensor,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Symmetric divergence of two predictions p and q, mean of (KL(p || q) + KL(q || p)) / 2.

    Tokens are compared in chunks and again in the backward pass, for which only the logits and the
    mask stay in memory.

    Source: R-Drop, arXiv 2106.14448, eq. 2; gradients go into both predictions.

    Args:
        logits: logits of one prediction, `[..., V]`.
        other_logits: logits of the other, `[..., V]`.
        mask: tokens that count, `[...]`; None counts all. No token counting gives 0.
        group: process group over whose tokens the mean is, as in `mutual_information_loss`.

    Returns:
        A scalar of at least float32, in nats.

    Raises:
        ValueError: if the shapes differ or the mask does not cover the tokens.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.losses import consistency_loss
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> consistency_loss(logits, logits).item()
        0.0
        >>> round(consistency_loss(logits, logits.flip(-1)).item(), 3)
        0.993
    """
    if logits.shape != other_logits.shape:
        raise ValueError(f"logits of shapes {tuple(logits.shape)} and {tuple(other_logits.shape)}")
    _, weight_N = flatten_tokens(logits[..., :1], mask)
    flat = (each.reshape(-1, each.shape[-1]) for each in (logits, other_logits))
    parts = zip(*(each.split(CHUNK) for each in (*flat, weight_N)), strict=True)
    with without_autocast(logits.device.type):
        summed = [
            checkpoint(_summed, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        totals = torch.stack([torch.stack(summed).sum(), weight_N.sum()])
        total, count = sum_over_ranks(totals, group).unbind()
        return total / count.clamp_min(1)


def _summed(logits_NV: Tensor, other_logits_NV: Tensor, weight_N: Tensor) -> Tensor:
    log_p_NV, log_q_NV = (
        at_least_float32(each).log_softmax(-1) for each in (logits_NV, other_logits_NV)
    )
    both_N = ((log_p_NV.exp() - log_q_NV.exp()) * (log_p_NV - log_q_NV)).sum(-1)
    return 0.5 * (weight_N @ both_N)

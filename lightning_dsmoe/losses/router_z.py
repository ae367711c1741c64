"""The loss that keeps router logits small.

Shapes: E experts; leading dimensions (tokens) are free.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dsmoe.losses.token_sums import flatten_tokens, sum_over_ranks
from lightning_dsmoe.precision import without_autocast


def router_z_loss(
    logits: Tensor, mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Mean squared log-partition of a router: mean_x (ln sum_i exp h_i(x))^2.

    Source: ST-MoE, arXiv 2202.08906, eq. 5.

    Args:
        logits: router logits, `[..., E]`.
        mask: tokens that count, `[...]`; None counts all. No token counting gives 0.
        group: process group over whose tokens the mean is, as in `mutual_information_loss`.

    Returns:
        A scalar of at least float32.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.losses import router_z_loss
        >>> round(router_z_loss(torch.zeros(5, 4)).item(), 3)  # (ln 4)^2
        1.922
    """
    logits, weight = flatten_tokens(logits, mask)
    with without_autocast(logits.device.type):
        totals = torch.stack([weight @ logits.logsumexp(-1).square(), weight.sum()])
        summed, count = sum_over_ranks(totals, group).unbind()
        return summed / count.clamp_min(1)

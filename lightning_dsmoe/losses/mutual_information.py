"""The loss that keeps experts specialised and balanced.

Shapes: N experts; leading dimensions (tokens X) are free.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dsmoe.losses.entropy import entropy
from lightning_dsmoe.losses.masking import flatten_tokens


def mutual_information_loss(
    probs: Tensor, mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Negative mutual information of tokens and experts of one router, in nats.

    L_MI = mean_x H(e|x) - H(e), p(e) = mean_x S(x)   (arXiv 2404.05567, eqs. 4 and 5)

    Minimising it makes each token's choice sharp and the use of the experts even; it lies in
    [-ln N, 0]. Sum it over routers.

    Args:
        probs: router probabilities S, `[..., N]`.
        mask: tokens that count, `[...]`, bool or 0/1; None counts all. No token counting gives 0.
        group: process group whose ranks share p(e), since the loss is not linear in it. Every rank
            then gets the loss of all the tokens, and gradients are right once averaged over the
            ranks, as DDP and FSDP do. None: the local tokens only.

    Returns:
        A scalar of at least float32.

    Raises:
        ValueError: if the mask does not cover the tokens.
    """
    probs, weight = flatten_tokens(probs, mask)
    totals = torch.cat(
        [weight @ probs, (weight @ entropy(probs))[None], weight.sum()[None]]
    )
    if group is not None:
        totals = _sum_over_ranks(totals, group)
    count = totals[-1].clamp_min(1)
    return (totals[-2] - count * entropy(totals[:-2] / count)) / count


def _sum_over_ranks(totals: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks whose gradients, averaged over the ranks, are those of the sum."""
    over_ranks = totals.detach().clone()
    dist.all_reduce(over_ranks, group=group)
    return over_ranks + dist.get_world_size(group) * (totals - totals.detach())

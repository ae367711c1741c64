"""Sums over the tokens of all data-parallel ranks."""

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(totals: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over ranks whose gradients, averaged over the ranks, are those of the sum.

    Args:
        totals: this rank's sums over its tokens.
        group: the ranks; None for this one alone.
    """
    if group is None:
        return totals
    over_ranks = totals.detach().clone()
    dist.all_reduce(over_ranks, group=group)
    return over_ranks + dist.get_world_size(group) * (totals - totals.detach())

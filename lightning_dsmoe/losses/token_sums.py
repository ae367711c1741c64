"""Sums over tokens: those that count, on this process or on all data-parallel ranks."""

import torch.distributed as dist
from torch import Tensor

from lightning_dsmoe.precision import at_least_float32


def flatten_tokens(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Put tokens in one dimension, at least float32, with a weight of 0 or 1 for each.

    Args:
        values: `[..., E]`.
        mask: `[...]`, bool or 0/1; None counts all.

    Returns:
        Values `[N, E]` and weights `[N]`.

    Raises:
        ValueError: if the mask does not cover the tokens.
    """
    values = at_least_float32(values)
    if mask is None:
        mask = values.new_ones(values.shape[:-1])
    elif mask.shape != values.shape[:-1]:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} for tokens of shape {tuple(values.shape[:-1])}"
        )
    return values.reshape(-1, values.shape[-1]), mask.reshape(-1).to(values)


def sum_over_ranks(totals: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over ranks whose gradients, averaged over the ranks, are those of the sum.

    DDP and FSDP divide gradients by the number of ranks. So the local part, the only one that has a
    gradient here, is multiplied by that number: the average is then the gradient that a single
    process with all tokens would have. A plain `all_reduce` would cut the graph; its autograd-aware
    form would need a second communication in the backward pass.

    Args:
        totals: this rank's sums over its tokens.
        group: the ranks; None for this one alone.
    """
    if group is None:
        return totals
    over_ranks = totals.detach().clone()
    dist.all_reduce(over_ranks, group=group)
    return over_ranks + dist.get_world_size(group) * (totals - totals.detach())

"""Which tokens each expert works on, and when sorting tokens by expert is worth it.

Shapes: N tokens, E experts.
"""

import torch
from torch import Tensor

from lightning_dsmoe.torch_private import in_function_transform

MULTIPLICATIONS_PER_KERNEL = {"cpu": 1e6, "other": 1e9}
"""Multiplications that a device does while one kernel of a forward and a backward pass starts."""
_TOKENS_PER_READ = 8
"""Reading a weight from memory takes as long as multiplying it with about so many tokens."""


def worth_sorting(n_tokens: int, n_weights: int, device: torch.device, *, n_kernels: int) -> bool:
    """Whether to run each expert on its own tokens rather than all experts on all tokens.

    That is faster where the work of one expert on all tokens takes longer than starting the
    kernels that it needs for itself. What share of the tokens is its own does not count, as a GPU
    would have to be waited for to know it. Otherwise all experts run, under gates of zero, which
    do not hide an infinite output. Under `torch.func`, `torch.compile` and `torch.export` all of
    them always do: `vmap` and graphs know no sizes that depend on the data.

    Args:
        n_tokens: tokens N.
        n_weights: weights of one expert.
        device: where it runs.
        n_kernels: kernels that one expert starts in a forward pass.
    """
    other = MULTIPLICATIONS_PER_KERNEL["other"]
    per_kernel = MULTIPLICATIONS_PER_KERNEL.get(device.type, other)
    if torch.compiler.is_compiling() or in_function_transform():  # exporting counts as compiling
        return False
    return n_weights * max(n_tokens, _TOKENS_PER_READ) > n_kernels * per_kernel


def tokens_of_each_expert(active_NE: Tensor) -> tuple[list[int], list[Tensor]]:
    """Sort active (token, expert) pairs by expert.

    Args:
        active_NE: the experts that run, bool.

    Returns:
        The experts with at least one token, ascending, and the ascending token indices of each.
    """
    pairs = active_NE.T.nonzero()
    counts = active_NE.sum(0).tolist()
    running = [e for e, count in enumerate(counts) if count]
    return running, list(pairs[:, 1].split([counts[e] for e in running]))

"""Which tokens each expert works on, and when it is worth to sort them.

Shapes: X tokens, E experts.
"""

import torch
from torch import Tensor

MULTIPLICATIONS_PER_KERNEL = {"cpu": 1e6}
"""What a device does while one kernel of a forward and a backward pass starts."""
ON_OTHER_DEVICES = 1e9
FEWEST_TOKENS = 8
"""Reading a weight takes as long as using it for so many tokens."""


def worth_sorting(n_tokens: int, n_weights: int, device: torch.device, *, n_kernels: int) -> bool:
    """Whether experts that run only on their own tokens are faster than all experts on all tokens.

    So it is where what an expert leaves out takes longer than starting the kernels that it needs
    for itself; small experts, and those on a GPU, are faster under gates of zero.

    Args:
        n_tokens: tokens X.
        n_weights: weights of one expert.
        device: where it runs.
        n_kernels: kernels that one expert starts in a forward pass.
    """
    per_kernel = MULTIPLICATIONS_PER_KERNEL.get(device.type, ON_OTHER_DEVICES)
    return n_weights * max(n_tokens, FEWEST_TOKENS) > n_kernels * per_kernel


def tokens_of_each_expert(active_XE: Tensor) -> tuple[list[int], list[Tensor]]:
    """Sort active (token, expert) pairs by expert.

    Args:
        active_XE: the experts that run, bool.

    Returns:
        The experts with at least one token, ascending, and the ascending token indices of each.
    """
    pairs = active_XE.T.nonzero()
    counts = active_XE.sum(0).tolist()
    running = [e for e, count in enumerate(counts) if count]
    return running, list(pairs[:, 1].split([counts[e] for e in running]))

"""Which tokens each expert works on.

Shapes: X tokens, E experts.
"""

from torch import Tensor


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

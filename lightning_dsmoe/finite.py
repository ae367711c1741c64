"""Gradients and weights that are not finite."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_NAMED = 3


def is_finite(norm: Tensor) -> bool:
    """Whether a norm, over all shards if there are several, is a finite number.

    Every rank gets the same answer, or some would stop and the others wait for them.
    """
    return bool(torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm))


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Norm of all numbers together; not finite if one of them is not."""
    return torch.nn.utils.get_total_norm(list(tensors))


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Names of the tensors that hold a number that is not finite, and how many more there are."""
    names = [name for name, tensor in tensors.items() if not is_finite(total_norm([tensor]))]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more or "the norm of all of them"

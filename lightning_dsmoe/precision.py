"""Computing in full precision whatever the precision of training."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32 and leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off inside the block, on any type of device."""
    if has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def has_autocast(device_type: str) -> bool:
    """Whether a type of device has autocast; "meta" has not."""
    if device_type == "meta":
        return False
    # Where code is compiled for, there is one; PyTorch 2.10 breaks the graph where it is asked.
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)

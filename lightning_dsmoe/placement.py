"""Where and in which type the weights of a layer are made, as `torch.nn` has it."""

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch.overrides import TorchFunctionMode

Device = torch.device | str | None


class Placement(TypedDict):
    """The options of a constructor."""

    device: Device
    dtype: torch.dtype | None


def placement(device: Device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Those options that were given, so that a user's own factories need not have them."""
    options = {"device": device, "dtype": dtype}
    return {name: value for name, value in options.items() if value is not None}


class WithoutDrawing(TorchFunctionMode):
    """Leaves out the functions of `torch.nn.init`, for weights that are loaded or never read.

    On the meta device torch draws a normal distribution by code that imports its compiler: 1.3 s.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return options["tensor"] if "tensor" in options else args[0]
        return func(*args, **options)

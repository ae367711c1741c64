"""Where and in which type the weights of a layer are made, as `torch.nn` has it."""

from typing import Any, TypedDict

import torch

Device = torch.device | str | None


class Placement(TypedDict):
    """The options of a constructor."""

    device: Device
    dtype: torch.dtype | None


def placement(device: Device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Those options that were given, so that a user's own factories need not have them."""
    options = {"device": device, "dtype": dtype}
    return {name: value for name, value in options.items() if value is not None}

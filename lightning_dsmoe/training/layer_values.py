"""The largest values in the layers of a model, and where the first is not finite."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dsmoe.finite import total_norm

Largest = dict[str, float]
"""The largest absolute value by the name of a module or a parameter; NaN if there is one."""


@contextmanager
def record_outputs(model: nn.Module) -> Iterator[Largest]:
    """Record what the modules inside a model return, innermost first, until the block ends.

    Args:
        model: any module; compiled parts of it run uncompiled in the block.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Identity(), nn.ReLU())
        >>> with record_outputs(model) as largest:
        ...     y = model(torch.tensor([-3.0, 2.0]))
        >>> largest
        {'0': 3.0, '1': 2.0}
    """
    calls: list[tuple[str, Tensor]] = []

    def note(name: str, output: Any) -> None:
        calls.extend((name, tensor.detach().abs().amax()) for tensor in _floating(output))

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if name
    ]
    largest: Largest = {}
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code calls no new hooks
            yield largest
    finally:
        for hook in hooks:
            hook.remove()
        for name, value in ((name, value.item()) for name, value in calls):
            before = largest.get(name, 0.0)
            if math.isfinite(before) and not math.isfinite(value):
                largest.pop(name, None)  # of several calls, the first one that is not finite counts
            largest[name] = max(before, value, key=_size)


def of_gradients(model: nn.Module) -> Largest:
    """The largest gradients by parameter; on all ranks together, where parameters are sharded."""
    norms = {
        name: total_norm([parameter.grad], math.inf)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    # Only a DTensor has `full_tensor`.
    return {
        name: float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        for name, norm in norms.items()
    }


def not_finite_names(largest: Mapping[str, float]) -> list[str]:
    """The names whose values are not all finite, in their order."""
    return [name for name, value in largest.items() if not math.isfinite(value)]


def by_layer(largest: Mapping[str, float]) -> str:
    """The largest values of each layer, in one line.

    What is inside of a numbered layer belongs to it, and layers with numbers stand side by side.

    Examples:
        >>> by_layer({"embed": 1.0, "blocks.0.mlp": 2.5, "blocks.0": 2.0, "blocks.1": 1e8})
        'embed 1, blocks 2.5 1e+08'
    """
    layers: dict[str, dict[str, float]] = {}
    for name, value in largest.items():
        if any(other.startswith(f"{name}.") for other in largest) and not _number(name):
            continue  # what holds layers returns what its last one does
        stack, number = _number(name) or (name, "")
        numbers = layers.setdefault(stack, {})
        numbers[number] = max(numbers.get(number, 0.0), value, key=_size)
    return ", ".join(
        " ".join([stack, *(f"{value:.2g}" for value in numbers.values())])
        for stack, numbers in layers.items()
    )


def _number(name: str) -> tuple[str, str] | None:
    """The name of the outermost list that a module is in, and its number there."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]) or "layers", part
    return None


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Mapping):
        yield from _floating(tuple(output.values()))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for each in output:
            yield from _floating(each)

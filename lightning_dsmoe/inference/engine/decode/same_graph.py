"""Modules that share a kernel, which takes their weights as inputs: those with the same graph."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dsmoe.inference.engine.decode.aot_cache import Kernel, Part, tensors_of
from lightning_dsmoe.inference.engine.decode.selection_inputs import free_sizes

_LEFT_OUT = ("_parameters", "_buffers", "_modules")


class Layout(NamedTuple):
    """What a kernel, which checks nothing, takes for granted of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """The layout of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.stride())


def kinds_of(modules: Sequence[nn.Module]) -> list[int]:
    """For each module the number of the first that has the same graph and layouts."""
    layouts = [layouts_of(module) for module in modules]
    firsts: list[int] = []
    kinds: list[int] = []
    for number, module in enumerate(modules):
        alike = (
            first
            for first in firsts
            if layouts[first] == layouts[number] and differ_in_weights_alone(module, modules[first])
        )
        kinds.append(next(alike, number))
        if kinds[-1] == number:
            firsts.append(number)
    return kinds


def layouts_of(module: nn.Module) -> list[Layout]:
    """Layouts of the weights of a module, with a first size of 0 for any."""
    free = free_sizes(module)
    tensors = enumerate(tensors_of(module))
    return [Layout.of(tensor[:0] if i in free else tensor) for i, tensor in tensors]


class Known(NamedTuple):
    """A kernel at hand, and what it takes.

    Args:
        layouts: of the inputs and of the weights that it was traced with.
        module: a module that it belongs to, whose weights may be others by now.
        kernel: the kernel.
    """

    layouts: list[Layout]
    module: nn.Module
    kernel: Kernel

    @classmethod
    def of(cls, part: Part, kernel: Kernel) -> "Known":
        """The kernel of a part."""
        return cls(_layouts_of_part(part), part.module, kernel)

    def fits(self, part: Part) -> bool:
        """Whether the kernel is that of a part, whose inputs are free in the same sizes."""
        return self.layouts == _layouts_of_part(part) and differ_in_weights_alone(
            self.module, part.module
        )


def _layouts_of_part(part: Part) -> list[Layout]:
    return [*map(Layout.of, part.inputs), *layouts_of(part.module)]


def differ_in_weights_alone(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same graph, as far as can be told from their attributes.

    What cannot be compared counts as different, which costs time but is never wrong.
    """
    modules, others = list(one.named_modules()), list(other.named_modules())
    return len(modules) == len(others) and all(
        name == of_other
        and type(module) is type(match)
        and _tensor_names(module) == _tensor_names(match)
        and _same_options(module, match)
        for (name, module), (of_other, match) in zip(modules, others, strict=True)
    )


def _tensor_names(module: nn.Module) -> list[tuple[str, bool]]:
    """Names of a module's own parameters and buffers, and whether each is there."""
    own = {**module._parameters, **module._buffers}
    return [(name, tensor is not None) for name, tensor in own.items()]


def _same_options(one: nn.Module, other: nn.Module) -> bool:
    options, others = (
        {k: v for k, v in vars(module).items() if k not in _LEFT_OUT} for module in (one, other)
    )
    return options.keys() == others.keys() and all(
        _same(value, others[name]) for name, value in options.items()
    )


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # arrays and the like, whose comparison has no single answer
        return False

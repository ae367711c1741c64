"""Expressions spelled so that the compiler makes one fast loop of each.

A matrix-vector product is a sum over a broadcast product, with the summed axis last in memory; what
goes into it is computed once and kept, not again for every row.

Shapes: T tokens, R rows, C columns.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_dsmoe.precision import at_least_float32


def kept(x: Tensor) -> Tensor:
    """The same values, held in memory instead of being computed again where they are used."""
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())


def rows_times(x_TC: Tensor, rows_RC: Tensor) -> Tensor:
    """Product of a matrix and a vector of every token, `[T, R]`, reading the matrix once."""
    rows_RC = at_least_float32(rows_RC)
    return torch.stack([(x_C * rows_RC).sum(-1) for x_C in at_least_float32(x_TC)])


def spelled_out(module: nn.Module, x: Tensor) -> Any:
    """Call a module on few tokens, with every linear layer as a sum over a broadcast product."""
    with _SpelledOut():
        return module(x)


class _SpelledOut(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = rows_times(kept(x.flatten(0, -2)), weight).to(x.dtype).unflatten(0, x.shape[:-1])
    return kept(y if bias is None else y + bias)

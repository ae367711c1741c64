"""Expressions spelled so that the compiler makes one fast loop of each.

A matrix-vector product is a sum over a broadcast product, with the summed axis last in memory. A
few rows are summed side by side, which keeps as many reads from memory under way. What goes into a
product is computed once and kept, not again for every row.

Shapes: T tokens, R rows, C columns, J parts of the rows, summed side by side, r = R / J; Z rows of
a part, of any number of matrices.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_dsmoe.precision import at_least_float32

_UNROLL = 4
_MIN_ROWS_TO_UNROLL = 16


def materialize(x: Tensor) -> Tensor:
    """The same values, held in memory instead of being computed again where they are used."""
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())


def unroll_factor(n_rows: int, n_tokens: int) -> int:
    """How many of a matrix's rows to sum at once: few if they meet many tokens or are few."""
    if n_rows < _MIN_ROWS_TO_UNROLL:
        return 1
    return math.gcd(n_rows, max(1, _UNROLL // n_tokens))


def row_dot_products(vectors: Iterable[Tensor], rows: Iterable[Tensor]) -> Tensor:
    """Sums of products of rows and a vector of every token.

    Args:
        vectors: `[C]` or `[Z, C]` of each token.
        rows: J parts `[Z, C]` of a matrix, in any type; they are read once for all tokens.

    Returns:
        `[Z, T, J]`, in the type of the vectors. Z comes first because it may be known only at run
        time: the compiler lays nothing out along such a size.
    """
    parts = list(rows)
    return materialize(
        torch.stack(
            [torch.stack([(x * part.to(x.dtype)).sum(-1) for part in parts], -1) for x in vectors],
            -2,
        )
    )


def matvec(x_TC: Tensor, rows_RC: Tensor) -> Tensor:
    """Product of a matrix and a vector of every token, `[T, R]`, reading the matrix once."""
    rows_JrC = rows_RC.unflatten(0, (unroll_factor(len(rows_RC), len(x_TC)), -1))
    sums_rTJ = row_dot_products(materialize(at_least_float32(x_TC)), rows_JrC)
    return sums_rTJ.permute(1, 2, 0).flatten(1)


def with_matvec_linears(module: nn.Module, x: Tensor) -> Any:
    """Call a module on few tokens, with every linear layer as a sum over a broadcast product."""
    with _MatvecLinears():
        return module(x)


class _MatvecLinears(TorchFunctionMode):
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
    y = matvec(x.flatten(0, -2), weight).to(x.dtype).unflatten(0, x.shape[:-1])
    return materialize(y if bias is None else y + bias)

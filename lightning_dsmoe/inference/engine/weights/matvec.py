"""Matrix-vector products, written so that Inductor makes one loop of each and no call to a BLAS.

A product is a sum over a broadcast product with the summed axis last in memory: `F.linear` read
weights at 6 to 9 GB/s for 2 to 32 tokens, these sums at 25 to 35 (docs/lab_notes/decoding.md).

Shapes: N tokens, R rows of a weight, I columns (inputs) of a weight, J rows of an unrolled loop,
r = R / J, Z rows of any number of matrices, P parts of a weight.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_dsmoe.precision import at_least_float32

# Several rows in one loop keep several reads from memory under way. 8-bit weights took 4.20, 4.27,
# 4.89 and 5.87 ms with 2, 4, 8 and 16 rows (docs/lab_notes/int8.md), 256 experts of only 16 rows
# 8.1 ms with 4 rows and 8.6 with one (docs/lab_notes/decoding.md).
_UNROLL = 4
_MIN_ROWS_TO_UNROLL = 16


def materialize(x: Tensor) -> Tensor:
    """The same values in memory of their own, computed once.

    Inductor inlines whatever is cheap to compute into the loop that uses it. In a matrix-vector
    product that is every row: without this, a norm or an activation of the input would be computed
    R times in place of once. `as_strided` needs real memory, so fusion ends at its input.
    """
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())


def unroll_factor(n_rows: int, n_tokens: int) -> int:
    """Rows of a weight to sum in one loop; fewer with more tokens, which have a sum each."""
    if n_rows < _MIN_ROWS_TO_UNROLL:
        return 1
    return math.gcd(n_rows, max(1, _UNROLL // n_tokens))


def row_dot_products(
    vectors: Iterable[Sequence[Tensor]], rows: Iterable[Sequence[Tensor]]
) -> Tensor:
    """Dot products of rows of a weight with a vector of every token.

    Args:
        vectors: `[I]` or `[Z, I]` of each of N tokens, in as many parts as the rows come in.
        rows: J parts `[Z, I]` of a weight, each in parts again whose products are summed; each is
            read once for all tokens.

    Returns:
        `[Z, N, J]`, of the type of the vectors. Z comes first because it may be known only at run
        time, and then no stride depends on it.
    """
    unrolled = list(rows)
    return materialize(
        torch.stack(
            [
                torch.stack([sum_of_products(x_P, row_P).sum(-1) for row_P in unrolled], -1)
                for x_P in vectors
            ],
            -2,
        )
    )


def sum_of_products(x_P: Sequence[Tensor], weight_P: Sequence[Tensor]) -> Tensor:
    """Inputs times weights, both in P parts, summed over the parts."""
    first, *others = (x * w.to(x.dtype) for x, w in zip(x_P, weight_P, strict=True))
    return sum(others, first)


def matvec(x_NI: Tensor, weight_RI: Tensor) -> Tensor:
    """x Wᵀ `[N, R]` for a few tokens in at least float32, reading the weight once.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.inference.engine.weights.matvec import matvec
        >>> matvec(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        tensor([[11., 17.]])
    """
    rows_JrI = weight_RI.unflatten(0, (unroll_factor(len(weight_RI), len(x_NI)), -1))
    vectors = [[x_I] for x_I in materialize(at_least_float32(x_NI))]
    sums_rNJ = row_dot_products(vectors, [[rows_rI] for rows_rI in rows_JrI])
    return sums_rNJ.permute(1, 2, 0).flatten(1)


def with_matvec_linears(module: nn.Module, x: Tensor) -> Any:
    """Call a module on a few tokens with `matvec` in place of `F.linear`.

    Inductor leaves `F.linear` to a BLAS, which is slow for a few tokens and which nothing fuses
    with. The exchange happens under a mode while the graph is traced, so that routers, those of
    users too, have a single forward, for training and decoding.
    """
    with _MatvecLinears():
        return module(x)


class _MatvecLinears(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_linear if func is F.linear else func)(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = matvec(x.flatten(0, -2), weight).to(x.dtype).unflatten(0, x.shape[:-1])
    return materialize(y if bias is None else y + bias)

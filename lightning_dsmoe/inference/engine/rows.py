"""Matrices of many experts, stored row by row as decoding reads them.

Shapes: E experts, R rows of one expert, C columns, K chosen experts, T tokens, Z = K R.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from lightning_dsmoe.inference.engine.spelling import kept
from lightning_dsmoe.precision import at_least_float32

_SHIFTS = (24, 16, 8, 0)
_HIGH_BYTE = -(1 << 24)


class Rows(nn.Module, ABC):
    """One matrix per expert whose rows are contiguous and are summed over when decoding.

    Args:
        transposed: whether a row is a column of the matrix given out, as for output weights.
    """

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed

    @abstractmethod
    def rows(self, experts: int | slice) -> Tensor:
        """Rows `[..., R, C]` of one or more experts as floating point."""

    @abstractmethod
    def products(self, x_TC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen experts' rows with a vector that they share.

        Args:
            x_TC: a vector for each token.
            experts_K: numbers of the chosen experts; None for all of them.

        Returns:
            `[T, K, R]` in at least float32.
        """

    @abstractmethod
    def summed_products(self, x_TKC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen experts' rows with a vector of each, summed over experts.

        Args:
            x_TKC: a vector for each token and chosen expert.
            experts_K: numbers of the chosen experts; None for all of them.

        Returns:
            `[T, R]` in at least float32.
        """

    def forward(self) -> Tensor:
        """The matrices of all experts, `[E, R, C]` or transposed `[E, C, R]`."""
        return self._matrix(slice(None))

    def of(self, experts: Sequence[int]) -> list[Tensor]:
        """The matrices of some experts, and only those."""
        return [self._matrix(e) for e in experts]

    def _matrix(self, experts: int | slice) -> Tensor:
        rows = self.rows(experts)
        return rows.mT if self.transposed else rows


class FloatRows(Rows):
    """Rows in floating point.

    Args:
        weight: `[E, R, C]`.
        transposed: whether a row is a column of the matrix given out.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, transposed: bool) -> None:
        super().__init__(transposed=transposed)
        self.register_buffer("weight", weight.contiguous())

    def rows(self, experts: int | slice) -> Tensor:
        """Rows `[..., R, C]`."""
        return self.weight[experts]

    def products(self, x_TC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen rows with a shared vector, `[T, K, R]`."""
        n_rows = self.weight.shape[1]
        weight_ZC = at_least_float32(_flat(self.weight, experts_K))
        x_TC = kept(at_least_float32(x_TC))
        products_TZ = torch.stack([(x_C * weight_ZC).sum(-1) for x_C in x_TC])
        return kept(products_TZ).unflatten(1, (-1, n_rows))

    def summed_products(self, x_TKC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen rows with a vector of each, summed over experts, `[T, R]`."""
        weight_RKC = at_least_float32(_across(self.weight, experts_K))
        x_TKC = kept(at_least_float32(x_TKC))
        return kept(torch.stack([(x_KC * weight_RKC).sum((-2, -1)) for x_KC in x_TKC]))

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"shape={tuple(self.weight.shape)}, transposed={self.transposed}"


class Int8Rows(Rows):
    """Rows as int8 codes with one float32 scale each, W = codes * scales / 127.

    The codes and scales are those of bitsandbytes' vector-wise quantisation of the rows; the scale
    is the largest magnitude of its row. Moving the module to another type changes that of the
    matrices given out; codes and scales stay exact.

    Args:
        codes: int8 `[E, R, C]`.
        scales: float32 `[E, R]`.
        transposed: whether a row is a column of the matrix given out.
        dtype: type of the matrices given out.
    """

    codes: Tensor
    scales: Tensor
    words: Tensor | None

    def __init__(
        self, codes: Tensor, scales: Tensor, *, transposed: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(transposed=transposed)
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("words", None, persistent=False)

    def rows(self, experts: int | slice) -> Tensor:
        """Rows `[..., R, C]`, made floating point when asked for."""
        scales = (self.scales[experts] / 127).to(self.dtype)
        return self.codes[experts].to(self.dtype) * scales[..., None]

    def join_codes(self) -> None:
        """View four codes as one word, if they divide so, which makes the products fast."""
        self.words = None if self.codes.shape[-1] % 4 else self.codes.view(torch.float32)

    def products(self, x_TC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen rows with a shared vector, `[T, K, R]`."""
        n_rows = self.codes.shape[1]
        lanes, scale = self._lanes(_flat, experts_K)
        x_TC = at_least_float32(x_TC)
        parts = [kept(x_TC[:, first :: len(lanes)]) for first in range(len(lanes))]
        sums_TZ = torch.stack([_dot([p[t] for p in parts], lanes).sum(-1) for t in range(len(x_TC))])
        products_TZ = kept(sums_TZ) * (_flat(self.scales, experts_K) * scale)
        return kept(products_TZ).unflatten(1, (-1, n_rows))

    def summed_products(self, x_TKC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen rows with a vector of each, summed over experts, `[T, R]`."""
        lanes, scale = self._lanes(_across, experts_K)
        scales_RK = _across(self.scales, experts_K)
        x_TKC = at_least_float32(x_TKC) * scale
        parts = [kept(x_TKC[..., first :: len(lanes)]) for first in range(len(lanes))]
        sums_TR = torch.stack(
            [
                (_dot([p[t] for p in parts], lanes) * scales_RK[..., None]).sum((-2, -1))
                for t in range(len(x_TKC))
            ]
        )
        return kept(sums_TR)

    def _lanes(
        self, pick: Callable[[Tensor, Tensor | None], Tensor], experts_K: Tensor | None
    ) -> tuple[list[Tensor], float]:
        """Every n-th code as floating point for n lanes, and what scales them to weights.

        Floats are loaded whole into vector registers where small integers are not, so four codes
        travel as a float of which only the bits are used, and each becomes the high byte of a word.
        """
        if self.words is None:
            return [pick(self.codes, experts_K).float()], 1 / 127
        words = pick(self.words, experts_K).view(torch.int32)
        codes = [((words << shift) if shift else words) & _HIGH_BYTE for shift in _SHIFTS]
        return [code.float() for code in codes], 2.0**-24 / 127

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales, self.words = self.scales, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"shape={tuple(self.codes.shape)}, transposed={self.transposed}"


def _flat(weight_ERX: Tensor, experts_K: Tensor | None) -> Tensor:
    """Rows of the chosen experts in one dimension, so that threads share them evenly."""
    flat = weight_ERX.flatten(0, 1)
    if experts_K is None:
        return flat
    n_rows = weight_ERX.shape[1]
    rows = torch.arange(n_rows, device=flat.device)
    return flat[kept((experts_K[:, None] * n_rows + rows).flatten())]


def _across(weight_ERX: Tensor, experts_K: Tensor | None) -> Tensor:
    """The chosen experts beside each other under every row, `[R, K, ...]`."""
    weight = weight_ERX if experts_K is None else weight_ERX[experts_K]
    return weight.transpose(0, 1)


def _dot(parts: Sequence[Tensor], lanes: Sequence[Tensor]) -> Tensor:
    """Sum over lanes of vectors times codes, in pairs, which keeps the chain of additions short."""
    terms = [part * lane for part, lane in zip(parts, lanes, strict=True)]
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]

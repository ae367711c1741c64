"""Matrices of many experts, stored row by row as decoding reads them.

Shapes: E experts, R rows of one expert, C columns, K chosen experts, T tokens, J rows summed side
by side, P shares of the threads, r = R / (P J).
"""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from lightning_dsmoe.inference.engine.spelling import kept, side_by_side
from lightning_dsmoe.precision import at_least_float32


class Rows(nn.Module):
    """One matrix per expert whose rows are contiguous and are summed over when decoding.

    Args:
        weight: `[E, R, C]`.
        transposed: whether a row is a column of the matrix given out, as for output weights.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.register_buffer("weight", weight.contiguous())

    def rows(self, experts: int | slice) -> Tensor:
        """Rows `[..., R, C]` of one or more experts as floating point."""
        return self.weight[experts]

    def forward(self) -> Tensor:
        """The matrices of all experts, `[E, R, C]` or transposed `[E, C, R]`."""
        return self._matrix(slice(None))

    def of(self, experts: Sequence[int]) -> list[Tensor]:
        """The matrices of some experts, and only those."""
        return [self._matrix(e) for e in experts]

    def _matrix(self, experts: int | slice) -> Tensor:
        rows = self.rows(experts)
        return rows.mT if self.transposed else rows

    def products(self, x_TC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen experts' rows with a vector that they share.

        Args:
            x_TC: a vector for each token.
            experts_K: numbers of the chosen experts; None for all of them.

        Returns:
            `[T, K, R]` in at least float32.
        """
        x_TC = kept(at_least_float32(x_TC))
        beside = side_by_side(self.weight.shape[1], len(x_TC))
        rows_KJrC = _chosen(self.weight.unflatten(1, (beside, -1)), experts_K)
        n_chosen = rows_KJrC.shape[0]
        rows_JZC = [rows_KJrC[:, j].flatten(0, 1).to(x_TC.dtype) for j in range(beside)]
        sums_TJZ = torch.stack(
            [torch.stack([(x_C * rows_ZC).sum(-1) for rows_ZC in rows_JZC]) for x_C in x_TC]
        )
        sums_TKJr = kept(sums_TJZ).unflatten(-1, (n_chosen, -1)).transpose(1, 2)
        return self._scaled(sums_TKJr.flatten(2), experts_K)

    def summed_products(self, x_TKC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen experts' rows with a vector of each, summed over experts.

        Args:
            x_TKC: a vector for each token and chosen expert.
            experts_K: numbers of the chosen experts; None for all of them.

        Returns:
            `[T, R]` in at least float32.
        """
        x_TKC = kept(at_least_float32(x_TKC))
        n_rows = self.weight.shape[1]
        beside = side_by_side(n_rows, len(x_TKC))
        shares = math.gcd(n_rows // beside, torch.get_num_threads())
        rows_KPJrC = _chosen(self.weight.unflatten(1, (shares, beside, -1)), experts_K)
        rows_JPKrC = [
            rows_KPJrC[:, :, j].transpose(0, 1).to(x_TKC.dtype) for j in range(beside)
        ]
        sums_TJPKr = torch.stack(
            [
                torch.stack([(x_KC[:, None] * rows_PKrC).sum(-1) for rows_PKrC in rows_JPKrC])
                for x_KC in x_TKC
            ]
        )
        sums_TKR = kept(sums_TJPKr).permute(0, 3, 2, 1, 4).flatten(2)
        return kept(self._scaled(sums_TKR, experts_K).sum(1))

    def _scaled(self, sums_TKR: Tensor, experts_K: Tensor | None) -> Tensor:
        del experts_K
        return sums_TKR

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

    scales: Tensor

    def __init__(
        self, codes: Tensor, scales: Tensor, *, transposed: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(codes, transposed=transposed)
        self.dtype = dtype
        self.register_buffer("scales", scales)

    def rows(self, experts: int | slice) -> Tensor:
        """Rows `[..., R, C]`, made floating point when asked for."""
        scales = (self.scales[experts] / 127).to(self.dtype)
        return self.weight[experts].to(self.dtype) * scales[..., None]

    def _scaled(self, sums_TKR: Tensor, experts_K: Tensor | None) -> Tensor:
        return sums_TKR * (_chosen(self.scales, experts_K) / 127)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        return self


def quantize_int8(rows: Rows) -> Int8Rows:
    """Quantise rows with bitsandbytes, on the CPU.

    Raises:
        ImportError: if bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.functional import int8_vectorwise_quant
    except ImportError as error:
        raise ImportError("8-bit weights need bitsandbytes: pip install bitsandbytes") from error
    weight = rows.weight
    codes, scales, _ = int8_vectorwise_quant(weight.flatten(0, 1).cpu().float())
    return Int8Rows(
        codes.view(weight.shape).to(weight.device),
        scales.view(weight.shape[:-1]).to(weight.device),
        transposed=rows.transposed,
        dtype=weight.dtype,
    )


def _chosen(weight_EX: Tensor, experts_K: Tensor | None) -> Tensor:
    return weight_EX if experts_K is None else weight_EX[experts_K]

"""Matrices of many experts, stored row by row as decoding reads them.

Shapes: E experts, R rows of one expert, C columns, K chosen experts, T tokens, J rows summed side
by side, r = R / J, Z = K r.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from lightning_dsmoe.inference.engine.weights.matvec import (
    materialize,
    row_dot_products,
    unroll_factor,
)
from lightning_dsmoe.precision import at_least_float32


class RowMajorWeights(nn.Module):
    """One matrix per expert whose rows are contiguous and are summed over when decoding.

    The products suit one token; `TiledWeights` has the same for more.

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

    def group(self, experts: Sequence[int]) -> Tensor:
        """Rows `[G, R, C]` of one or two experts, in ascending order; a view if in one piece."""
        first, *others = experts
        step = others[0] - first if others else 1
        return self.rows(slice(first, first + step * len(experts), step))

    def forward(self) -> Tensor:
        """The matrices of all experts, `[E, R, C]` or transposed `[E, C, R]`."""
        return self._matrix(slice(None))

    def of(self, experts: Sequence[int]) -> list[Tensor]:
        """The matrices of some experts, and only those."""
        return [self._matrix(e) for e in experts]

    def _matrix(self, experts: int | slice) -> Tensor:
        rows = self.rows(experts)
        return rows.mT if self.transposed else rows

    def project(self, x_TC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen experts' rows with a vector that they share.

        Args:
            x_TC: a vector for each token.
            experts_K: numbers of the chosen experts; None for all of them.

        Returns:
            `[K, T, R]` in at least float32.
        """
        rows_JKrC = self._unrolled_rows(len(x_TC), experts_K)
        sums_ZTJ = row_dot_products(
            materialize(at_least_float32(x_TC)), [r.flatten(0, 1) for r in rows_JKrC]
        )
        sums_KrTJ = sums_ZTJ.unflatten(0, rows_JKrC[0].shape[:2])
        return self._rescale(sums_KrTJ, experts_K).permute(0, 2, 3, 1).flatten(2)

    def project_and_sum(self, x_KTC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen experts' rows with a vector of each, summed over experts.

        Args:
            x_KTC: a vector for each chosen expert and token.
            experts_K: numbers of the chosen experts; None for all of them.

        Returns:
            `[T, R]` in at least float32.
        """
        n_tokens = x_KTC.shape[1]
        rows_JKrC = self._unrolled_rows(n_tokens, experts_K)
        n_rows = rows_JKrC[0].shape[1]
        x_KTC = materialize(at_least_float32(x_KTC))
        x_TZC = [x_KTC[:, t, None].expand(-1, n_rows, -1).flatten(0, 1) for t in range(n_tokens)]
        sums_ZTJ = row_dot_products(x_TZC, [r.flatten(0, 1) for r in rows_JKrC])
        sums_KrTJ = sums_ZTJ.unflatten(0, rows_JKrC[0].shape[:2])
        return self._rescale(sums_KrTJ, experts_K).sum(0).permute(1, 2, 0).flatten(1)

    def _unrolled_rows(self, n_tokens: int, experts_K: Tensor | None) -> list[Tensor]:
        """The chosen experts' rows `[K, r, C]`, in as many parts as are summed side by side."""
        unroll = unroll_factor(self.weight.shape[1], n_tokens)
        rows_KJrC = _chosen(self.weight.unflatten(1, (unroll, -1)), experts_K)
        return [rows_KJrC[:, j] for j in range(unroll)]

    def _rescale(self, sums_KrTJ: Tensor, experts_K: Tensor | None) -> Tensor:
        del experts_K
        return sums_KrTJ

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"shape={tuple(self.weight.shape)}, transposed={self.transposed}"


class Int8RowMajorWeights(RowMajorWeights):
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
        exact = torch.promote_types(self.dtype, torch.float32)  # small scales vanish in float16
        scales = (self.scales[experts] / 127).to(exact)
        return (self.weight[experts].to(exact) * scales[..., None]).to(self.dtype)

    def _rescale(self, sums_KrTJ: Tensor, experts_K: Tensor | None) -> Tensor:
        scales_KJr: Tensor = _chosen(self.scales, experts_K).unflatten(1, (sums_KrTJ.shape[-1], -1))
        return sums_KrTJ * (scales_KJr / 127).mT[:, :, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        return self


def as_row_major(weight: nn.Module) -> RowMajorWeights:
    """A weight of a packed decoder, which has rows."""
    assert isinstance(weight, RowMajorWeights)
    return weight


def quantize_int8(rows: RowMajorWeights) -> Int8RowMajorWeights:
    """Quantise rows with bitsandbytes, on the CPU.

    Raises:
        ImportError: if bitsandbytes is not installed.
    """
    # It warns of a kernel for 4 bits, which are not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.functional import int8_vectorwise_quant
    except ImportError as error:
        raise ImportError("8-bit weights need bitsandbytes: pip install bitsandbytes") from error
    weight = rows.weight
    codes, scales, _ = int8_vectorwise_quant(weight.flatten(0, 1).cpu().float())
    return Int8RowMajorWeights(
        codes.view(weight.shape).to(weight.device),
        scales.view(weight.shape[:-1]).to(weight.device),
        transposed=rows.transposed,
        dtype=weight.dtype,
    )


def _chosen(weight_EX: Tensor, experts_K: Tensor | None) -> Tensor:
    return weight_EX if experts_K is None else weight_EX[experts_K]

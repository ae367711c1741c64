"""Matrices of many experts, stored in tiles of rows for several tokens at once.

A tile holds some rows column by column, so that a sum over columns keeps one vector of results for
every token and reads each weight once.

Shapes: E experts, N tiles of one expert, C columns, t rows of one tile, R = N t rows of one expert,
K chosen experts, T tokens, Z = K N.
"""

import math
from typing import Self

import torch
from torch import Tensor, nn

from lightning_dsmoe.inference.engine.weights.matvec import materialize
from lightning_dsmoe.inference.engine.weights.row_major import Int8RowMajorWeights, RowMajorWeights
from lightning_dsmoe.precision import at_least_float32

_TILE_ROWS = 16
_FEW_TOKENS = 8


class TiledWeights(nn.Module):
    """The matrices of `RowMajorWeights` in tiles, with the same products.

    Args:
        weight: floating point or int8 codes, `[E, N, C, t]`.
        scales: what one unit of a code is worth in each row, float32 `[E, N, t]`; None for weights
            in floating point.
    """

    weight: Tensor
    scales: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, rows: RowMajorWeights) -> Self:
        """A copy of rows in tiles."""
        height = math.gcd(rows.weight.shape[1], _TILE_ROWS)
        weight = rows.weight.unflatten(1, (-1, height)).mT.contiguous()
        if not isinstance(rows, Int8RowMajorWeights):
            return cls(weight, None)
        return cls(weight, (rows.scales / 127).unflatten(1, (-1, height)))

    def project(self, x_TC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen experts' rows with a vector that they share, `[K, T, R]`.

        Args:
            x_TC: a vector for each token.
            experts_K: numbers of the chosen experts; None for all of them.
        """
        x_TC = materialize(at_least_float32(x_TC))
        tiles_KNCt, scales_KNt = self._chosen(experts_K)
        tiles_ZCt = tiles_KNCt.flatten(0, 1)
        sums_ZTt = materialize(
            torch.stack([(x_C[:, None] * tiles_ZCt.to(x_C.dtype)).sum(1) for x_C in x_TC], 1)
        )
        sums_KNTt: Tensor = sums_ZTt.unflatten(0, tiles_KNCt.shape[:2])
        if scales_KNt is not None:
            sums_KNTt = sums_KNTt * scales_KNt[:, :, None]
        return sums_KNTt.transpose(1, 2).flatten(2)

    def project_and_sum(self, x_KTC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the chosen experts' rows with a vector of each, summed: `[T, R]`.

        Args:
            x_KTC: a vector for each chosen expert and token.
            experts_K: numbers of the chosen experts; None for all of them.
        """
        x_KTC = materialize(at_least_float32(x_KTC))
        if x_KTC.shape[1] <= _FEW_TOKENS:
            sums_NTt = self._summed_expert_by_expert(x_KTC, experts_K)
        else:
            sums_NTt = self._summed_at_once(x_KTC, experts_K)
        return sums_NTt.transpose(0, 1).flatten(1)

    def _summed_expert_by_expert(self, x_KTC: Tensor, experts_K: Tensor | None) -> Tensor:
        """Reads each expert in one go, at the price of a sum over experts afterwards."""
        tiles_KNCt, scales_KNt = self._chosen(experts_K)
        n_tiles = tiles_KNCt.shape[1]
        tiles_ZCt = tiles_KNCt.flatten(0, 1).to(x_KTC.dtype)
        x_TZC = [
            x_KTC[:, t, None].expand(-1, n_tiles, -1).flatten(0, 1) for t in range(x_KTC.shape[1])
        ]
        sums_ZTt = materialize(
            torch.stack([(x_ZC[..., None] * tiles_ZCt).sum(1) for x_ZC in x_TZC], 1)
        )
        sums_KNTt: Tensor = sums_ZTt.unflatten(0, tiles_KNCt.shape[:2])
        if scales_KNt is not None:
            sums_KNTt = sums_KNTt * scales_KNt[:, :, None]
        return sums_KNTt.sum(0)

    def _summed_at_once(self, x_KTC: Tensor, experts_K: Tensor | None) -> Tensor:
        tiles_KNCt, scales_KNt = self._chosen(experts_K)
        tiles_KNCt = tiles_KNCt.to(x_KTC.dtype)
        if scales_KNt is not None:
            tiles_KNCt = tiles_KNCt * scales_KNt[:, :, None]
        return materialize(
            torch.stack(
                [
                    (x_KTC[:, t, None, :, None] * tiles_KNCt).sum((0, 2))
                    for t in range(x_KTC.shape[1])
                ],
                1,
            )
        )

    def _chosen(self, experts_K: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if experts_K is None:
            return self.weight, self.scales
        return self.weight[experts_K], None if self.scales is None else self.scales[experts_K]

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"shape={tuple(self.weight.shape)}"

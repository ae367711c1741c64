"""Weights of all experts of a layer, stored in tiles for several tokens at once.

A tile holds 16 rows column by column. The loop over columns then keeps one vector register of sums
for every token and reads each weight once for all of them, where row-major weights would need a
register for every row and token.

Shapes: E experts, M tiles of one expert, I columns (inputs), t rows of one tile, R = M t rows of
one expert, K active experts, N tokens, Z = K M.
"""

import math
from typing import Self

import torch
from torch import Tensor, nn

from lightning_dsmoe.inference.engine.weights import row_major
from lightning_dsmoe.inference.engine.weights.matvec import materialize
from lightning_dsmoe.precision import at_least_float32

_TILE_ROWS = 16  # float32 values in a register of AVX-512
_MAX_TOKENS_EXPERT_BY_EXPERT = 8


class TiledWeights(nn.Module):
    """The weights of `RowMajorWeights` in tiles, with the same products.

    Args:
        weight: floating point or int8 codes, `[E, M, I, t]`.
        scales: what one unit of a code is worth in each row, float32 `[E, M, t]`; None for weights
            in floating point.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights
        >>> from lightning_dsmoe.inference.engine.weights.tiled import TiledWeights
        >>> TiledWeights.of(RowMajorWeights(torch.randn(8, 64, 4), transposed=False))
        TiledWeights(shape=(8, 4, 4, 16))
    """

    weight: Tensor
    scales: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, weights: row_major.RowMajorWeights) -> Self:
        """A copy of row-major weights in tiles."""
        height = math.gcd(weights.weight.shape[1], _TILE_ROWS)
        weight = weights.weight.unflatten(1, (-1, height)).mT.contiguous()
        if not isinstance(weights, row_major.Int8RowMajorWeights):
            return cls(weight, None)
        return cls(weight, (weights.scales / 127).unflatten(1, (-1, height)))

    def project(self, x_NI: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the active experts' weights with an input that they share, `[K, N, R]`.

        Args:
            x_NI: an input for each token.
            experts_K: numbers of the active experts; None for all.
        """
        x_NI = materialize(at_least_float32(x_NI))
        tiles_KMIt, scales_KMt = self._take(experts_K)
        tiles_ZIt = tiles_KMIt.flatten(0, 1)
        sums_ZNt = materialize(
            torch.stack([(x_I[:, None] * tiles_ZIt.to(x_I.dtype)).sum(1) for x_I in x_NI], 1)
        )
        sums_KMNt = _rescale(sums_ZNt.unflatten(0, tiles_KMIt.shape[:2]), scales_KMt)
        return sums_KMNt.transpose(1, 2).flatten(2)

    def project_and_sum(self, x_KNI: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the active experts' weights with an input for each, summed: `[N, R]`.

        Args:
            x_KNI: an input for each active expert and token.
            experts_K: numbers of the active experts; None for all.
        """
        x_KNI = materialize(at_least_float32(x_KNI))
        few = x_KNI.shape[1] <= _MAX_TOKENS_EXPERT_BY_EXPERT
        sum_products = _sum_expert_by_expert if few else _sum_in_one_loop
        return sum_products(x_KNI, *self._take(experts_K)).transpose(0, 1).flatten(1)

    def _take(self, experts_K: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scales = self.scales
        return (
            row_major.take_experts(self.weight, experts_K),
            None if scales is None else row_major.take_experts(scales, experts_K),
        )

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"shape={tuple(self.weight.shape)}"


def _sum_expert_by_expert(x_KNI: Tensor, tiles_KMIt: Tensor, scales_KMt: Tensor | None) -> Tensor:
    """One loop over experts and tiles, which are read in the order in which they are stored.

    The price is a sum over experts afterwards, of K N values in every row; with many tokens it
    costs more than the order of reads gains.
    """
    n_tiles = tiles_KMIt.shape[1]
    tiles_ZIt = tiles_KMIt.flatten(0, 1).to(x_KNI.dtype)
    x_NZI = [x_KNI[:, n, None].expand(-1, n_tiles, -1).flatten(0, 1) for n in range(x_KNI.shape[1])]
    sums_ZNt = materialize(torch.stack([(x_ZI[..., None] * tiles_ZIt).sum(1) for x_ZI in x_NZI], 1))
    return _rescale(sums_ZNt.unflatten(0, tiles_KMIt.shape[:2]), scales_KMt).sum(0)


def _sum_in_one_loop(x_KNI: Tensor, tiles_KMIt: Tensor, scales_KMt: Tensor | None) -> Tensor:
    """Every tile of the result summed over experts and columns at once."""
    tiles_KMIt = tiles_KMIt.to(x_KNI.dtype)
    if scales_KMt is not None:
        tiles_KMIt = tiles_KMIt * scales_KMt[:, :, None]
    sums = [(x_KNI[:, n, None, :, None] * tiles_KMIt).sum((0, 2)) for n in range(x_KNI.shape[1])]
    return materialize(torch.stack(sums, 1))


def _rescale(sums_KMNt: Tensor, scales_KMt: Tensor | None) -> Tensor:
    return sums_KMNt if scales_KMt is None else sums_KMNt * scales_KMt[:, :, None]

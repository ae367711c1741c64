"""Weights of all experts of a layer, stored in tiles for several tokens at once.

A tile holds 16 rows column by column, or 8 of words of codes. The loop over columns then keeps
one vector register of sums for every token and reads each weight once for all of them, where
row-major weights would need a register for every row and token.

Shapes: E experts, M tiles of one expert, I columns (inputs), t rows of one tile, R = M t rows of
one expert, K active experts, N tokens, Z = K M; P parts of a weight: one, or the four codes of a
word, of which there are Q = I / 4 in a row (I counts words there).
"""

import math
from typing import Self

import torch
from torch import Tensor, nn

from lightning_dsmoe.inference.engine.weights import int8_words, row_major
from lightning_dsmoe.inference.engine.weights.matvec import materialize, sum_of_products
from lightning_dsmoe.precision import at_least_float32

_TILE_ROWS = 16  # float32 values in a register of AVX-512
_TILE_ROWS_OF_WORDS = 8  # and of AVX2: 2.55 ms for 4 tokens, of 16 rows 2.85 (lab_notes/int8.md)
_MAX_TOKENS_EXPERT_BY_EXPERT = 8


class TiledWeights(nn.Module):
    """The weights of `RowMajorWeights` in tiles, with the same products.

    Args:
        weight: floating point or int8 codes, `[E, M, I, t]`, or words of codes `[E, M, Q, t]`.
        scales: what one unit of a code is worth in each row, float32 `[E, M, t]`; None for weights
            in floating point.
        words: whether `weight` holds words.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights
        >>> from lightning_dsmoe.inference.engine.weights.tiled import TiledWeights
        >>> TiledWeights.of(RowMajorWeights(torch.randn(8, 64, 4), transposed=False))
        TiledWeights(shape=(8, 4, 4, 16))
    """

    weight: Tensor
    scales: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor | None, *, words: bool = False) -> None:
        super().__init__()
        self.words = words
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, weights: row_major.RowMajorWeights) -> Self:
        """A copy of row-major weights in tiles, of codes as this machine reads them best."""
        stored, scales, words = weights.weight, None, False
        if isinstance(weights, row_major.Int8RowMajorWeights):
            scales, words = weights.scales / 127, int8_words.reads_words()
        if words:
            stored = int8_words.words_of(stored)
        height = math.gcd(stored.shape[1], _TILE_ROWS_OF_WORDS if words else _TILE_ROWS)
        tiles = stored.unflatten(1, (-1, height)).mT.contiguous()
        if scales is not None:
            scales = scales.unflatten(1, (-1, height))
        return cls(tiles, scales, words=words)

    def project(self, x_NI: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the active experts' weights with an input that they share, `[K, N, R]`.

        Args:
            x_NI: an input for each token.
            experts_K: numbers of the active experts; None for all.
        """
        x_NI = materialize(at_least_float32(x_NI))
        tiles_KMIt, scales_KMt = self._take(experts_K)
        parts_PZIt = int8_words.parts_of(tiles_KMIt.flatten(0, 1))
        x_NIP = int8_words.split_inputs(x_NI, len(parts_PZIt))
        sums = [sum_of_products(x_IP[:, None].unbind(-1), parts_PZIt).sum(1) for x_IP in x_NIP]
        sums_ZNt = materialize(torch.stack(sums, 1))
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
        take = int8_words.take_words if self.words else row_major.take_experts
        scales = self.scales
        return (
            take(self.weight, experts_K),
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
    parts_PZIt = int8_words.parts_of(tiles_KMIt.flatten(0, 1))
    x_KNIP = int8_words.split_inputs(x_KNI, len(parts_PZIt))
    repeats = (-1, n_tiles, -1, -1)
    x_NZIP = [x_KIP[:, None].expand(repeats).flatten(0, 1) for x_KIP in x_KNIP.unbind(1)]
    sums = [sum_of_products(x_ZIP[:, :, None].unbind(-1), parts_PZIt).sum(1) for x_ZIP in x_NZIP]
    sums_ZNt = materialize(torch.stack(sums, 1))
    return _rescale(sums_ZNt.unflatten(0, tiles_KMIt.shape[:2]), scales_KMt).sum(0)


def _sum_in_one_loop(x_KNI: Tensor, tiles_KMIt: Tensor, scales_KMt: Tensor | None) -> Tensor:
    """Every tile of the result summed over experts and columns at once."""
    parts_PKMIt = [part.to(x_KNI.dtype) for part in int8_words.parts_of(tiles_KMIt)]
    if scales_KMt is not None:
        parts_PKMIt = [part * scales_KMt[:, :, None] for part in parts_PKMIt]
    x_KNIP = int8_words.split_inputs(x_KNI, len(parts_PKMIt))
    sums = [
        sum_of_products(x_KIP[:, None, :, None].unbind(-1), parts_PKMIt).sum((0, 2))
        for x_KIP in x_KNIP.unbind(1)
    ]
    return materialize(torch.stack(sums, 1))


def _rescale(sums_KMNt: Tensor, scales_KMt: Tensor | None) -> Tensor:
    return sums_KMNt if scales_KMt is None else sums_KMNt * scales_KMt[:, :, None]

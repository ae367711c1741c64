"""Output weights of all experts as one matrix, for the masked layers of a GPU.

Decoding reads the output weights of each expert by themselves, `[E, D, F]`, which is no view of the
matrix `[D, E F]` that one wide product needs. A sum over E smaller products reads and writes the
residual stream E times, which on a GPU takes as long as the products of few tokens themselves.

Shapes: E experts, F expert width, D model width.
"""

import warnings
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_dsmoe.inference.engine.weights.row_major import Int8RowMajorWeights, RowMajorWeights


class _Copy(NamedTuple):
    """A wide copy, None where it does not fit, and how often its weights had changed."""

    wide: Tensor | None
    changes: int


# By the tensor and not its module: one that moves is another tensor, and the copy of before goes.
_COPIES = WeakTensorKeyDictionary()


def wide(weights: RowMajorWeights) -> Tensor | None:
    """Output weights `[E, D, F]` as `[D, E F]`; None where memory has no room for the copy.

    The copy is kept until the weights move, change or go, but for weights in 8 bits: their copy
    would take twice their memory, so they are dequantized at each call.

    Args:
        weights: the output weights, row by row.
    """
    if isinstance(weights, Int8RowMajorWeights) or len(weights.weight) == 1:
        return _widened(weights)
    weight = weights.weight
    changes = 0 if weight.is_inference() else weight._version
    copy: _Copy | None = _COPIES.get(weight)
    if copy is None or copy.changes != changes:
        copy = _COPIES[weight] = _Copy(_that_fits(weights), changes)
    return copy.wide


def _widened(weights: RowMajorWeights) -> Tensor:
    return rearrange(weights.rows(slice(None)), "e d f -> d (e f)").contiguous()


def _that_fits(weights: RowMajorWeights) -> Tensor | None:
    try:
        return _widened(weights)
    except torch.OutOfMemoryError:
        warnings.warn(
            f"there is no room for a second copy of output weights, "
            f"{weights.weight.nbytes / 1e6:.0f} MB for each layer: layers that run all experts "
            "run them one by one, more slowly; fewer or shorter sequences leave more room",
            stacklevel=2,
        )
        return None

"""Products of the weights of the experts in slots with a few tokens, in one of two ways.

Shapes: B sequences, one token of each; K slots, R rows of one expert's weight, I columns (inputs).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.decode_cuda.expert_slots import ExpertSlots
from lightning_dsmoe.inference.engine.weights.row_major import Int8RowMajorWeights, RowMajorWeights
from lightning_dsmoe.precision import at_least_float32

Product = Callable[[RowMajorWeights, Tensor, ExpertSlots], Tensor]
"""A product of row-major weights with tokens, in at least float32."""


class Products(NamedTuple):
    """One way to multiply: both of its products.

    Args:
        project: of an input `[B, I]` that the experts share: `[K, B, R]`. What is in unused slots
            is finite, but arbitrary.
        project_and_sum: of an input `[K, B, I]`, zero in unused slots, summed over experts:
            `[B, R]`.
    """

    project: Product
    project_and_sum: Product


def project(weights: RowMajorWeights, x_BI: Tensor, slots: ExpertSlots) -> Tensor:
    """Products `[K, B, R]` with an input that the experts share, as sums over products."""
    return _row_dot_products(weights, x_BI[None], slots)


def project_and_sum(weights: RowMajorWeights, x_KBI: Tensor, slots: ExpertSlots) -> Tensor:
    """Products with an input for each expert, summed over experts: `[B, R]`."""
    return _row_dot_products(weights, x_KBI, slots).sum(0)


def _row_dot_products(weights: RowMajorWeights, x_KBI: Tensor, slots: ExpertSlots) -> Tensor:
    x_KBI = at_least_float32(x_KBI)
    rows_KRI = weights.weight[slots.experts_K].to(x_KBI.dtype)
    sums_KBR = (x_KBI[:, :, None] * rows_KRI[:, None]).sum(-1)
    if not isinstance(weights, Int8RowMajorWeights):
        return sums_KBR
    return sums_KBR * (weights.scales[slots.experts_K] / 127)[:, None]


SUMS = Products(project, project_and_sum)
"""Sums over broadcast products, of which Inductor makes kernels that gather as they read.

Any type, and any device; uncompiled it copies the weights that it reads.
"""


def products_for(weight: Tensor) -> Products:
    """The way for a model whose weights are like this one.

    Args:
        weight: any weight of the model.
    """
    of_triton = weight.is_cuda and weight.dtype != torch.float64
    if not of_triton:
        return SUMS
    # The default until a GPU has measured both: its kernel skips unused slots, and reads a weight
    # once for all tokens, where a sum for each token reads it again, at best from the cache.
    from lightning_dsmoe.inference.engine.decode_cuda import triton_products

    return Products(triton_products.project, triton_products.project_and_sum)

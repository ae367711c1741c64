"""Products of the weights of the experts in slots with a few tokens, as one Triton kernel.

Shapes: B sequences, one token of each; K slots, R rows of one expert's weight, I columns (inputs),
M sums over slots; in the kernel r rows, c columns and t tokens of one block.
"""

from __future__ import annotations  # Triton is missing where nobody runs this, but all may read it

from typing import Any

import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.decode_cuda.expert_slots import ExpertSlots
from lightning_dsmoe.inference.engine.weights.row_major import Int8RowMajorWeights, RowMajorWeights

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_PROGRAMS = 512  # some four for each multiprocessor of a large GPU, which hide each other's waiting
_ONE_TOKEN = {1: (16, 256), 2: (8, 512), 4: (8, 256)}  # by the bytes of a weight; see `_block`
_MIN_DOT = 16  # the smallest side of a block that tensor cores multiply


def project(weights: RowMajorWeights, x_BI: Tensor, slots: ExpertSlots) -> Tensor:
    """Products `[K, B, R]` with an input that the experts share; zero in unused slots."""
    return _launch(weights, x_BI[None], slots, len(slots.experts_K))


def project_and_sum(weights: RowMajorWeights, x_KBI: Tensor, slots: ExpertSlots) -> Tensor:
    """Products with an input for each expert, summed over experts: `[B, R]`.

    A few programs share the slots of a block of rows, and their sums are added afterwards, always
    in the same order: atomic additions would give other roundings each time.
    """
    blocks = -(-weights.weight.shape[1] // _block(weights, x_KBI.shape[1])[0])
    n_sums = min(len(slots.experts_K), -(-_PROGRAMS // blocks))
    return _launch(weights, x_KBI, slots, n_sums).sum(0)


def _block(weights: RowMajorWeights, n_tokens: int) -> tuple[int, int]:
    """Rows and columns of a block.

    For one token a thread has two reads of 16 bytes under way and registers for their products; for
    more, blocks are what tensor cores multiply, and Triton reads the next ones meanwhile.
    """
    rows, columns = _ONE_TOKEN[weights.weight.element_size()] if n_tokens == 1 else (32, 64)
    return rows, max(_MIN_DOT, min(columns, 1 << (weights.weight.shape[2] - 1).bit_length()))


def _factor_dtype(weights: RowMajorWeights, n_tokens: int) -> torch.dtype:
    """One token is multiplied in float32; tensor cores want both factors in the model's type."""
    return torch.float32 if n_tokens == 1 else weights.out_dtype


def _launch(weights: RowMajorWeights, x_KBI: Tensor, slots: ExpertSlots, n_sums: int) -> Tensor:
    """Sums `[M, B, R]`, each over every M-th of the slots."""
    n_slots, n_tokens, n_columns = x_KBI.shape
    n_rows = weights.weight.shape[1]
    rows, columns = _block(weights, n_tokens)
    x_KBI = x_KBI.to(_factor_dtype(weights, n_tokens)).contiguous()
    sums_MBR = x_KBI.new_empty((n_sums, n_tokens, n_rows), dtype=torch.float32)
    of_int8 = isinstance(weights, Int8RowMajorWeights)
    multiply_slots[(-(-n_rows // rows), n_sums)](
        x_KBI,
        weights.weight,
        weights.scales if isinstance(weights, Int8RowMajorWeights) else sums_MBR,
        slots.experts_K,
        slots.n_active_1,
        sums_MBR,
        SHARED=n_slots == 1,
        N_TOKENS=n_tokens,
        N_ROWS=n_rows,
        N_COLUMNS=n_columns,
        N_SUMS=n_sums,
        N_STEPS=-(-len(slots.experts_K) // n_sums),
        SCALED=of_int8,
        TOKENS=1 if n_tokens == 1 else _MIN_DOT,
        ROWS=rows,
        COLUMNS=columns,
    )
    return sums_MBR


def _multiply_slots(  # type: ignore[no-untyped-def]
    # Without types: Inductor copies this text to where their names are not known.
    x_ptr,  # noqa: ANN001
    weight_ptr,  # noqa: ANN001
    scales_ptr,  # noqa: ANN001
    experts_ptr,  # noqa: ANN001
    n_active_ptr,  # noqa: ANN001
    sums_ptr,  # noqa: ANN001
    SHARED: tl.constexpr,
    N_TOKENS: tl.constexpr,
    N_ROWS: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    N_SUMS: tl.constexpr,
    N_STEPS: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One block of rows of one sum: those of the slots `program_id(1)`, plus N_SUMS, and so on."""
    of_sum = tl.program_id(1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    total_rt = tl.zeros([ROWS, TOKENS], tl.float32)
    n_active = tl.load(n_active_ptr)
    for step in range(N_STEPS):
        slot = of_sum + step * N_SUMS
        if slot < n_active:  # of the other slots nothing is read
            expert = tl.load(experts_ptr + slot)  # int64, as are offsets into large weights
            weight_r1 = weight_ptr + (expert * N_ROWS + r[:, None]) * N_COLUMNS
            x_slot_ptr = x_ptr + (0 if SHARED else slot) * N_TOKENS * N_COLUMNS
            if N_TOKENS == 1:
                products_rc = tl.zeros([ROWS, COLUMNS], tl.float32)
                for start in range(0, N_COLUMNS, COLUMNS):
                    c = start + tl.arange(0, COLUMNS)
                    inside_rc = (r[:, None] < N_ROWS) & (c[None, :] < N_COLUMNS)
                    weight_rc = tl.load(weight_r1 + c[None, :], inside_rc, other=0)
                    x_c = tl.load(x_slot_ptr + c, c < N_COLUMNS, other=0)
                    products_rc += weight_rc.to(tl.float32) * x_c[None, :]
                sums_rt = tl.sum(products_rc, 1)[:, None]
            else:
                sums_rt = tl.zeros([ROWS, TOKENS], tl.float32)
                for start in range(0, N_COLUMNS, COLUMNS):
                    c = start + tl.arange(0, COLUMNS)
                    inside_rc = (r[:, None] < N_ROWS) & (c[None, :] < N_COLUMNS)
                    weight_rc = tl.load(weight_r1 + c[None, :], inside_rc, other=0)
                    inside_ct = (c[:, None] < N_COLUMNS) & (t[None, :] < N_TOKENS)
                    x_ct = tl.load(
                        x_slot_ptr + t[None, :] * N_COLUMNS + c[:, None], inside_ct, other=0
                    )
                    sums_rt = tl.dot(
                        weight_rc.to(x_ct.dtype), x_ct, sums_rt, input_precision="ieee"
                    )
            if SCALED:
                scales_r = tl.load(scales_ptr + expert * N_ROWS + r, r < N_ROWS, other=0)
                sums_rt *= scales_r[:, None] / 127
            total_rt += sums_rt
    places_rt = (of_sum * N_TOKENS + t[None, :]) * N_ROWS + r[:, None]
    tl.store(sums_ptr + places_rt, total_rt, (r[:, None] < N_ROWS) & (t[None, :] < N_TOKENS))


multiply_slots: Any = _multiply_slots if triton is None else triton.jit(_multiply_slots)
"""The kernel; see `_multiply_slots`."""

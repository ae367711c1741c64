"""Repacking a decoder for inference, in place: weights row by row, some of them in 8 bits."""

import copy
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, cast

import torch
from torch import nn

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.decoder import Decoder, TokenHead
from lightning_dsmoe.experts import Experts, MixtureOfExperts
from lightning_dsmoe.inference.engine.weights.int8_head import Int8Head
from lightning_dsmoe.inference.engine.weights.row_major import (
    Int8RowMajorWeights,
    RowMajorWeights,
    as_row_major,
    quantize_int8,
)
from lightning_dsmoe.inference.engine.weights.tiled import TiledWeights
from lightning_dsmoe.stacked import StackedWeight

_SHORT_ROWS = 48  # whose sums one by one take longer than reading them

Quantization = Literal["int8"]
Quantizer = Callable[[RowMajorWeights], Int8RowMajorWeights]


def pack(
    decoder: Decoder, *, quantization: Quantization | None = None, quantize_head: bool = False
) -> None:
    """Store all expert and head weights row by row, as decoding reads them.

    Args:
        decoder: the decoder.
        quantization: "int8" puts the weights of all routed experts into 8 bits. Routers, norms,
            shared experts, embeddings and the projections of keys and values stay as they are.
        quantize_head: put the last projection into 8 bits too; tied embeddings stay beside it.

    Raises:
        ImportError: if something is to be quantised and bitsandbytes is not installed.
    """
    _pack(decoder, quantize_int8, quantization=quantization, quantize_head=quantize_head)


def is_packed(decoder: Decoder) -> bool:
    """Whether `pack` has been here."""
    return any(isinstance(module, RowMajorWeights | Int8Head) for module in decoder.modules())


def pack_empty(
    decoder: Decoder,
    *,
    dtype: torch.dtype,
    quantization: Quantization | None,
    quantize_head: bool,
) -> None:
    """Give a decoder the empty weights that `pack` would, on its own device.

    Args:
        decoder: the decoder.
        dtype: type of the matrices that 8-bit weights give out, which is that of the model.
        quantization: as in `pack`.
        quantize_head: as in `pack`.
    """

    def empty(rows: RowMajorWeights) -> Int8RowMajorWeights:
        shape, device = rows.weight.shape, rows.weight.device
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        scales = torch.empty(shape[:-1], dtype=torch.float32, device=device)
        return Int8RowMajorWeights(codes, scales, transposed=rows.transposed, dtype=dtype)

    _pack(decoder, empty, quantization=quantization, quantize_head=quantize_head)


def tile_weights(decoder: Decoder, n_tokens: int) -> Decoder:
    """A packed decoder with a copy of expert weights in tiles; all else is shared.

    For one token only weights in 8 bits and very short rows are better off in tiles.

    Args:
        decoder: the packed decoder, which is given back if there is nothing to copy.
        n_tokens: tokens that decode at once.
    """

    def better(module: nn.Module) -> bool:
        if not isinstance(module, RowMajorWeights):
            return False
        short = module.weight.shape[-1] <= _SHORT_ROWS
        return n_tokens > 1 or short or isinstance(module, Int8RowMajorWeights)

    layers = [m for m in decoder.modules() if isinstance(m, Experts | HeadGroups)]
    if not any(better(child) for layer in layers for child in layer.children()):
        return decoder
    shared = {id(t): t for t in [*decoder.parameters(), *decoder.buffers()]}
    copied = copy.deepcopy(decoder, shared)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if better(child) and isinstance(module, Experts | HeadGroups):
                setattr(module, name, TiledWeights.of(as_row_major(child)))
    return copied


def quantized_bytes(decoder: Decoder) -> dict[str, int]:
    """Bytes of codes and scales of each quantised weight, by its name."""
    return {
        name: module.weight.nbytes + module.scales.nbytes
        for name, module in decoder.named_modules()
        if isinstance(module, Int8RowMajorWeights)
    }


class _Stacked(NamedTuple):
    owner: nn.Module
    name: str
    weight: StackedWeight
    transposed: bool
    routed: bool


def _pack(
    decoder: Decoder,
    quantizer: Quantizer,
    *,
    quantization: Quantization | None,
    quantize_head: bool,
) -> None:
    for owner, name, weight, transposed, routed in list(_stacked_weights(decoder)):
        matrices = weight.weight.detach()
        rows = RowMajorWeights(matrices.mT if transposed else matrices, transposed=transposed)
        setattr(owner, name, quantizer(rows) if routed and quantization == "int8" else rows)
    if quantize_head:
        rows = RowMajorWeights(decoder.head.weight.detach()[None], transposed=False)
        decoder.head = cast(TokenHead, Int8Head(quantizer(rows)))
        decoder.tie_embeddings = False


def _stacked_weights(decoder: Decoder) -> Iterator[_Stacked]:
    """All stacked weights, and whether decoding reads their columns and a router gates them."""
    routed: set[nn.Module] = set()
    for module in decoder.modules():
        if isinstance(module, MixtureOfExperts):
            routed.add(module.experts)
        elif isinstance(module, MixtureOfAttentionHeads):
            routed.add(module.heads)
        names = {}
        if isinstance(module, Experts):
            names = {"w_in": False, "w_out": True}
        elif isinstance(module, HeadGroups):
            names = {"w_q": False, "w_o": True}
        for name, transposed in names.items():
            weight = getattr(module, name)
            if isinstance(weight, StackedWeight):
                yield _Stacked(module, name, weight, transposed, module in routed)

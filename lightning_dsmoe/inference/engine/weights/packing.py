"""Repacking a decoder for inference, in place: weights row by row, some of them in 8 bits."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
from torch import nn

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.decoder import Decoder, TokenHead
from lightning_dsmoe.experts import Experts, MixtureOfExperts
from lightning_dsmoe.inference.engine.weights import int8_words
from lightning_dsmoe.inference.engine.weights.int8_head import Int8Head
from lightning_dsmoe.inference.engine.weights.row_major import (
    Int8RowMajorWeights,
    RowMajorWeights,
    quantize_int8,
)
from lightning_dsmoe.inference.engine.weights.tiled import TiledWeights
from lightning_dsmoe.stacked import StackedWeight

# The dot product of so short a row ends in adding up the values of a register, which takes longer
# than reading the row. Tiles have no such end: 256 experts of 16 units went from 8.5 to 8.0 ms
# (docs/lab_notes/decoding.md).
_SHORT_ROWS = 48

# Weights of a layer, and whether decoding reads their columns, which are then stored as rows.
_TRANSPOSED = {"w_in": False, "w_out": True, "w_q": False, "w_o": True}

Quantization = Literal["int8"]
Quantizer = Callable[[RowMajorWeights], Int8RowMajorWeights]


def pack(
    decoder: Decoder,
    *,
    quantization: Quantization | None = None,
    quantize_head: bool = False,
    quantizer: Quantizer = quantize_int8,
) -> None:
    """Store all expert and head weights row by row, as decoding reads them.

    Args:
        decoder: the decoder, which is changed in place.
        quantization: "int8" puts the weights of all routed experts into 8 bits. Routers, norms,
            shared experts, embeddings and the projections of keys and values stay as they are.
        quantize_head: put the last projection into 8 bits too; tied embeddings stay beside it.
        quantizer: puts a weight into 8 bits.

    Raises:
        ImportError: if something is to be quantized and bitsandbytes is not installed.

    Examples:
        >>> from functools import partial
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe.inference.engine.weights.packing import pack
        >>> attention = partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4)
        >>> feed_forward = partial(MixtureOfExperts, n_experts=4, d_expert=6)
        >>> decoder = Decoder(32, 8, 1, attention=attention, feed_forward=feed_forward)
        >>> pack(decoder)
        >>> decoder.blocks[0].feed_forward.experts.w_out
        RowMajorWeights(shape=(4, 8, 6), transposed=True)
    """
    # Layers in a list, not their weights: each is freed when its packed copy takes its place.
    modules = decoder.modules
    routed: set[nn.Module] = {m.experts for m in modules() if isinstance(m, MixtureOfExperts)}
    routed |= {m.heads for m in modules() if isinstance(m, MixtureOfAttentionHeads)}
    for layer in [m for m in modules() if isinstance(m, Experts | HeadGroups)]:
        quantize = layer in routed and quantization == "int8"
        pack_weights(layer, quantizer if quantize else None)
    if quantize_head:
        weights = RowMajorWeights(decoder.head.weight.detach()[None], transposed=False)
        decoder.head = cast(TokenHead, Int8Head(quantizer(weights)))
        decoder.tie_embeddings = False


def pack_weights(layer: Experts | HeadGroups, quantizer: Quantizer | None = None) -> None:
    """Store the weights of a layer row by row, in place.

    Args:
        layer: the experts or heads.
        quantizer: puts a weight into 8 bits; None leaves it as it is.
    """
    for name, transposed in _TRANSPOSED.items():
        if isinstance(stacked := getattr(layer, name, None), StackedWeight):
            matrices = stacked.weight.mT if transposed else stacked.weight
            weights = RowMajorWeights(matrices.detach(), transposed=transposed)
            setattr(layer, name, weights if quantizer is None else quantizer(weights))


def is_packed(model: nn.Module) -> bool:
    """Whether some of a model's weights are stored for inference already."""
    return any(isinstance(module, RowMajorWeights | Int8Head) for module in model.modules())


def pack_empty(
    decoder: Decoder, *, dtype: torch.dtype, quantization: Quantization | None, quantize_head: bool
) -> None:
    """Give a decoder the weights that `pack` would, on its own device and uninitialized.

    Args:
        decoder: the decoder, which is changed in place.
        dtype: type of the matrices that 8-bit weights give out, which is that of the model.
        quantization: as in `pack`.
        quantize_head: as in `pack`.
    """
    empty = partial(empty_int8, dtype=dtype)
    pack(decoder, quantization=quantization, quantize_head=quantize_head, quantizer=empty)


def empty_int8(weights: RowMajorWeights, *, dtype: torch.dtype) -> Int8RowMajorWeights:
    """Uninitialized 8-bit weights in the place of others.

    Args:
        weights: the others.
        dtype: type of the matrices that the 8-bit weights give out.
    """
    shape, device = weights.weight.shape, weights.weight.device
    codes = torch.empty(shape, dtype=torch.int8, device=device)
    scales = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    return Int8RowMajorWeights(codes, scales, transposed=weights.transposed, dtype=dtype)


def tile_weights(decoder: Decoder, n_tokens: int) -> Decoder:
    """A packed decoder with its weights laid out as a compiled step reads them best.

    Weights that are laid out anew are copies, in tiles, or words in the same memory as the codes;
    all other weights are shared.

    Args:
        decoder: the packed decoder, which is returned itself if nothing gains.
        n_tokens: tokens in a step, one of each sequence.
    """
    # What is in the memo of `deepcopy` is not copied: here, all tensors.
    shared = {id(tensor): tensor for tensor in [*decoder.parameters(), *decoder.buffers()]}
    copied = copy.deepcopy(decoder, shared)
    changed = False
    for layer in [m for m in copied.modules() if isinstance(m, Experts | HeadGroups | Int8Head)]:
        for name, weights in list(layer.named_children()):
            if isinstance(weights, RowMajorWeights):
                head = isinstance(layer, Int8Head)
                layout = _head_layout(weights) if head else _layout(weights, n_tokens)
                setattr(layer, name, layout)
                changed |= layout is not weights
    return copied if changed else decoder


def _layout(weights: RowMajorWeights, n_tokens: int) -> RowMajorWeights | TiledWeights:
    """How a step of so many tokens reads weights of experts.

    For one token float32 is 3 to 6 % slower in tiles, unless rows are very short. 8 bits took
    4.06 ms in tiles and 4.27 in rows (docs/lab_notes/int8.md, decoding.md), but rows of words are
    faster than tiles of them, and no copy.
    """
    if n_tokens > 1 or weights.weight.shape[-1] <= _SHORT_ROWS:
        return TiledWeights.of(weights)
    if not isinstance(weights, Int8RowMajorWeights):
        return weights
    return weights.in_words() if int8_words.reads_words() else TiledWeights.of(weights)


def _head_layout(rows: RowMajorWeights) -> RowMajorWeights:
    if isinstance(rows, Int8RowMajorWeights) and int8_words.reads_words():
        return rows.in_words()
    return rows


def quantized_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of codes and scales of each quantized weight, by its name."""
    return {
        name: module.weight.nbytes + module.scales.nbytes
        for name, module in model.named_modules()
        if isinstance(module, Int8RowMajorWeights)
    }

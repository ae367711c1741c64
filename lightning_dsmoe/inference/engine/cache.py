"""The keys and values of all layers in two tensors.

Shapes: L layers, S capacity, B sequences, H KV heads, C head width.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_dsmoe.attention import KVCache
from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.inference.engine.gather import Past

_BLOCK = 64


class DecoderCache:
    """Room for the keys and values of a decoder whose layers have KV heads alike.

    Args:
        decoder: the decoder.
        batch_size: sequences B.
        capacity: tokens S per sequence.

    Raises:
        ValueError: if the layers' KV heads differ.
    """

    def __init__(self, decoder: Decoder, batch_size: int, capacity: int) -> None:
        blocks = list(cast(Iterable[Block], decoder.blocks))
        shapes = {(block.attention.n_kv_heads, block.attention.d_head) for block in blocks}
        if len(shapes) > 1:
            raise ValueError(f"the layers of this decoder differ in their KV heads: {shapes}")
        weight = decoder.embedding.weight
        shape = (len(blocks), capacity, batch_size, *shapes.pop())
        self.keys = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.values = torch.zeros_like(self.keys)
        self.seen = torch.zeros(capacity, batch_size, device=weight.device, dtype=torch.bool)
        self.layers = [
            KVCache.over(keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3), self.seen.T)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Tokens held, padding included."""
        return self.layers[0].length

    def used(self) -> list[Past]:
        """The part in use of each layer, whose length changes only every few tokens."""
        size = min(self.capacity, -(-max(self.length, 1) // _BLOCK) * _BLOCK)
        seen = self.seen[:size]
        return [
            Past(keys, values, seen)
            for keys, values in zip(self.keys[:, :size], self.values[:, :size], strict=True)
        ]

    def append(self, keys_BHC: Sequence[Tensor], values_BHC: Sequence[Tensor]) -> None:
        """Add one token of each sequence, given its keys and values in every layer.

        Raises:
            ValueError: if the cache is full.
        """
        at = self.length
        if at >= self.capacity:
            raise ValueError(f"{at + 1} tokens do not fit a cache of {self.capacity}")
        torch.stack(tuple(keys_BHC), out=self.keys[:, at])
        torch.stack(tuple(values_BHC), out=self.values[:, at])
        self.seen[at] = True
        for layer in self.layers:
            layer.length = at + 1

"""The keys and values of all layers in two tensors.

Shapes: L layers, S capacity, B sequences, T sequences of a step, H KV heads, C head width.
"""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_dsmoe.attention import KVCache
from lightning_dsmoe.decoder import Block, Decoder

_BLOCK = 64


class Slots(NamedTuple):
    """The part of a cache in use, with the slot that new tokens are to be written to.

    Shape:
        keys: `[S, T, H, C]` of each layer.
        values: `[S, T, H, C]` of each layer.
        seen_ST: bool, the slots that hold a token and not padding, the new ones among them.
        at_1: int64, the slot of the new tokens.
    """

    keys: list[Tensor]
    values: list[Tensor]
    seen_ST: Tensor
    at_1: Tensor


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
        self._keys = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self._values = torch.zeros_like(self._keys)
        self._seen = torch.zeros(capacity, batch_size, device=weight.device, dtype=torch.bool)
        self._at = torch.zeros(1, device=weight.device, dtype=torch.int64)
        self._slots = Slots([], [], self._seen[:0], self._at)
        self.layers = [
            KVCache.over(keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3), self._seen.T)
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self._keys.shape[1]

    @property
    def batch_size(self) -> int:
        """Sequences B."""
        return self._keys.shape[2]

    @property
    def length(self) -> int:
        """Tokens held, padding included."""
        return self.layers[0].length

    def next_slots(self) -> Slots:
        """Count one more token of each sequence, whose keys and values the caller writes.

        The part in use grows in steps, so that its views are made anew only now and then.

        Raises:
            ValueError: if the cache is full.
        """
        at = self.length
        if at >= self.capacity:
            raise ValueError(f"{at + 1} tokens do not fit a cache of {self.capacity}")
        self._at.fill_(at)
        self._seen[at] = True
        for layer in self.layers:
            layer.length = at + 1
        used = min(self.capacity, (at // _BLOCK + 1) * _BLOCK)
        if len(self._slots.seen_ST) != used:
            self._slots = Slots(
                list(self._keys[:, :used]),
                list(self._values[:, :used]),
                self._seen[:used],
                self._at,
            )
        return self._slots

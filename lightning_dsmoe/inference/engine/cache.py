"""The KV caches of all layers in two tensors `[L, S, B, H, C]`.

Positions come before sequences, unlike in a layer's own `KVCache`, so that the part in use is one
piece of memory per layer and a new token of every sequence is one contiguous write.

Shapes: L layers, S positions (capacity, or the part in use), B sequences in a batch, H KV heads,
C head width.
"""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_dsmoe.attention import KVCache
from lightning_dsmoe.decoder import Block, Decoder

# The part in use grows by so many positions at a time. Kernels see few sizes, and views of every
# layer's tensors are made once per growth instead of at every token; the slots that are still empty
# are masked.
_POSITIONS_PER_GROWTH = 64


class Slots(NamedTuple):
    """The part of a cache in use, and the slot for one new token of each sequence.

    Shape:
        keys: `[S, B, H, C]` of each layer.
        values: `[S, B, H, C]` of each layer.
        seen_SB: bool `[S, B]`, the slots that hold a token and not padding, the new ones included.
        at_1: int64, the slot of the new tokens.
    """

    keys: list[Tensor]
    values: list[Tensor]
    seen_SB: Tensor
    at_1: Tensor


class DecoderCache:
    """Preallocated KV caches of a decoder, all of whose layers have the same KV heads.

    Args:
        decoder: the decoder.
        batch_size: sequences B.
        capacity: positions per sequence.

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
        """Positions per sequence."""
        return self._keys.shape[1]

    @property
    def batch_size(self) -> int:
        """Sequences B."""
        return self._keys.shape[2]

    @property
    def length(self) -> int:
        """Positions in use, padding included."""
        return self.layers[0].length

    def next_slots(self) -> Slots:
        """Reserve a slot for one more token of each sequence; the caller writes keys and values.

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
        used = min(self.capacity, (at // _POSITIONS_PER_GROWTH + 1) * _POSITIONS_PER_GROWTH)
        if len(self._slots.seen_SB) != used:
            keys, values = list(self._keys[:, :used]), list(self._values[:, :used])
            self._slots = Slots(keys, values, self._seen[:used], self._at)
        return self._slots

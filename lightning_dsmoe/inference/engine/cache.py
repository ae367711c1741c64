"""The KV caches of all layers, two tensors `[S, B, H, C]` for each.

Positions come before sequences, unlike in a layer's own `KVCache`, so that the part in use is one
piece of memory per layer and a new token of every sequence is one contiguous write.

Shapes: S positions (capacity, or the part in use), B sequences in a batch, H KV heads,
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
    """Preallocated KV caches of a decoder, whose layers may differ in their KV heads.

    Args:
        decoder: the decoder.
        batch_size: sequences B.
        capacity: positions per sequence.
    """

    def __init__(self, decoder: Decoder, batch_size: int, capacity: int) -> None:
        layers = [block.attention for block in cast(Iterable[Block], decoder.blocks)]
        weight = decoder.embedding.weight
        self._keys, self._values = (
            [
                weight.new_zeros(capacity, batch_size, layer.n_kv_heads, layer.d_head)
                for layer in layers
            ]
            for _ in range(2)
        )
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
        return len(self._seen)

    @property
    def batch_size(self) -> int:
        """Sequences B."""
        return self._seen.shape[1]

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
            keys, values = ([each[:used] for each in all] for all in (self._keys, self._values))
            self._slots = Slots(keys, values, self._seen[:used], self._at)
        return self._slots

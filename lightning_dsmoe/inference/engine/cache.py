"""The KV caches of all layers, two tensors `[S, B, H, C]` for each.

Positions come before sequences, unlike in a layer's own `KVCache`, so that the part in use is one
piece of memory per layer and a new token of every sequence is one contiguous write.

Shapes: S positions (capacity, or the part in use), B sequences in a batch, H KV heads,
C head width.
"""

from collections.abc import Iterable, Sequence
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

    @property
    def tensors(self) -> list[Tensor]:
        """Those with an axis of positions."""
        return [*self.keys, *self.values, self.seen_SB]

    def up_to(self, end: int) -> "Slots":
        """The first slots, in the same memory."""
        keys, values = ([each[:end] for each in all] for all in (self.keys, self.values))
        return Slots(keys, values, self.seen_SB[:end], self.at_1)


@torch.inference_mode(False)
def empty_slots(decoder: Decoder, batch_size: int, capacity: int) -> Slots:
    """Memory for the keys and values of a decoder, whose layers may differ in their KV heads.

    Text is generated in inference mode, but a step may write outside of it, which PyTorch does not
    allow for tensors made inside.

    Args:
        decoder: the decoder.
        batch_size: sequences B.
        capacity: positions S per sequence.
    """
    layers = [block.attention for block in cast(Iterable[Block], decoder.blocks)]
    weight = decoder.embedding.weight
    keys, values = (
        [weight.new_zeros(capacity, batch_size, each.n_kv_heads, each.d_head) for each in layers]
        for _ in range(2)
    )
    seen_SB = torch.zeros(capacity, batch_size, device=weight.device, dtype=torch.bool)
    return Slots(keys, values, seen_SB, torch.zeros(1, device=weight.device, dtype=torch.int64))


class DecoderCache:
    """Preallocated KV caches of a decoder.

    Args:
        decoder: the decoder.
        batch_size: sequences B.
        capacity: positions per sequence.
    """

    sequence_of_row: Tensor
    """Number of the sequence in each row of memory; the last one is also in rows left over."""

    def __init__(self, decoder: Decoder, batch_size: int, capacity: int) -> None:
        self.batch_size = batch_size
        self.layers: list[KVCache] = []
        self._take(empty_slots(decoder, batch_size, capacity))

    def _take(self, memory: Slots) -> None:
        self._all = memory
        self._slots = memory.up_to(0)
        length = self.layers[0].length if self.layers else 0
        n = self.batch_size
        self.sequence_of_row = self._sequences(self.n_rows)
        self.layers = [
            KVCache.over(
                keys.permute(1, 2, 0, 3)[:n], values.permute(1, 2, 0, 3)[:n], memory.seen_SB.T[:n]
            )
            for keys, values in zip(memory.keys, memory.values, strict=True)
        ]
        for layer in self.layers:
            layer.length = length

    def move_to(self, memory: Slots) -> None:
        """Continue in memory of the caller's, which has room for as many positions or more.

        A CUDA graph reads and writes the memory that it was captured with.

        Args:
            memory: where to; what is in it is lost.
        """
        for new, old in zip(memory.tensors, self._all.tensors, strict=True):
            new[self.length :].zero_()  # nobody attends there, but 0 times NaN is NaN
            new[: self.length] = old[: self.length]
        self._take(memory.up_to(self.capacity))

    @torch.inference_mode(False)
    @torch.no_grad()
    def pad_to(self, n_rows: int) -> None:
        """Have so many rows in memory, those beyond the sequences copies of the last one.

        Keys and values are copied, once for a batch.
        """
        if n_rows == self.n_rows:
            return
        rows = self._sequences(n_rows)
        *layers, seen_SB = (each.index_select(1, rows) for each in self._all.tensors)
        half = len(layers) // 2
        # Its own number of the new slot, too: memory that it leaves is another cache's next.
        self._take(Slots(layers[:half], layers[half:], seen_SB, self._all.at_1.clone()))

    def is_in(self, memory: Slots) -> bool:
        """Whether it is where `move_to` moved it: padding takes it elsewhere."""
        return self._all.at_1 is memory.at_1

    def _sequences(self, n_rows: int) -> Tensor:
        rows = torch.arange(n_rows, device=self._all.at_1.device)
        return rows.clamp_max(self.batch_size - 1)

    @property
    def capacity(self) -> int:
        """Positions per sequence."""
        return len(self._all.seen_SB)

    @property
    def n_rows(self) -> int:
        """Sequences in memory, with those beyond `batch_size` that fill a step up."""
        return self._all.seen_SB.shape[1]

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
        self._all.at_1.fill_(at)
        self._all.seen_SB[at].fill_(True)
        for layer in self.layers:
            layer.length = at + 1
        used = min(self.capacity, (at // _POSITIONS_PER_GROWTH + 1) * _POSITIONS_PER_GROWTH)
        if len(self._slots.seen_SB) != used:
            self._slots = self._all.up_to(used)
        return self._slots


@torch.inference_mode(False)
@torch.no_grad()
def gathered(
    decoder: Decoder, sequences: Sequence[tuple[DecoderCache, int]], room: int
) -> DecoderCache:
    """A cache of some sequences of others, whose last tokens are in the same slot.

    The shorter ones have empty slots before them, as padding on the left leaves them; positions
    are counted without those. Slots that are empty for all are left out.

    Args:
        decoder: the decoder of all.
        sequences: a cache, which is not changed, and a number in it, for each.
        room: positions beyond those of the longest sequence.
    """
    starts = [int(each._all.seen_SB[:, row].int().argmax()) for each, row in sequences]
    lengths = [each.length - start for (each, _), start in zip(sequences, starts, strict=True)]
    longest = max(lengths)
    together = DecoderCache(decoder, len(sequences), longest + room)
    for row, ((cache, at), length) in enumerate(zip(sequences, lengths, strict=True)):
        for new, old in zip(together._all.tensors, cache._all.tensors, strict=True):
            new[longest - length : longest, row] = old[cache.length - length : cache.length, at]
    for layer in together.layers:
        layer.length = longest
    return together

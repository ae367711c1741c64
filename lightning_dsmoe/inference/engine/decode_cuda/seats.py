"""Memory that CUDA graphs are captured with, which one cache after another moves into.

Shapes: B sequences, V vocabulary.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.cache import DecoderCache, Slots

_FEWEST_SLOTS = 64
_WARM_UPS = 3  # libraries take memory and choose kernels in their first calls

Run = Callable[[], Tensor]
"""Runs a step on what its buffers hold, and gives the buffer `[B, V]` of its logits."""


def bucket(n_positions: int) -> int:
    """The power of two up to which slots are attended to, of 64 or more.

    A graph serves one number of slots. So a sequence of n tokens meets log2(n / 64) of them, and
    the slots that are empty or not used cost less than reading the weights.

    Examples:
        >>> [bucket(n) for n in (1, 64, 65, 5000)]
        [64, 64, 128, 8192]
    """
    return max(_FEWEST_SLOTS, 1 << (n_positions - 1).bit_length())


class Seat:
    """Memory of a cache, and the runs that were captured with it by the number of slots.

    It stays when the cache is gone, for the next one: a new capture takes longer than many tokens.

    Args:
        memory: slots, as many as `bucket` of the positions wanted.
    """

    def __init__(self, memory: Slots) -> None:
        self.memory = memory
        self.runs: dict[int, Run] = {}
        self._cache: Callable[[], DecoderCache | None] = lambda: None

    @property
    def cache(self) -> DecoderCache | None:
        """The cache that lies here, if any does and is still in use."""
        cache = self._cache()
        return cache if cache is not None and cache.is_in(self.memory) else None

    def seat(self, cache: DecoderCache) -> None:
        """Move a cache here."""
        cache.move_to(self.memory)
        self._cache = weakref.ref(cache)


def captured(run: Run, pool: Any) -> Run:
    """A CUDA graph of a run, which is run a few times first; the run may be repeated.

    Args:
        run: what to capture.
        pool: memory that graphs share, which never run at the same time.

    Raises:
        RuntimeError: if something in it waits for the GPU or cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using the GPU.
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        logits_BV = run()

    def replay() -> Tensor:
        graph.replay()
        return logits_BV

    return replay

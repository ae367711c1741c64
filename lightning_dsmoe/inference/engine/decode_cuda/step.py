"""The decode step on a GPU, replayed as one CUDA graph.

Shapes: B sequences, one new token of each; V vocabulary.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.cache import DecoderCache, empty_slots
from lightning_dsmoe.inference.engine.decode.compiled_step import CannotCompile, compiling
from lightning_dsmoe.inference.engine.decode_cuda.memory import half_of, what_would_fit
from lightning_dsmoe.inference.engine.decode_cuda.products import Products, products_for
from lightning_dsmoe.inference.engine.decode_cuda.seats import Run, Seat, bucket, captured
from lightning_dsmoe.inference.engine.decode_cuda.static_step import StaticStep
from lightning_dsmoe.precision import without_autocast
from lightning_dsmoe.routing import SelectionPlan

_EXAMPLE_CAPACITY = 64


class CudaStep:
    """One new token of each of a few sequences on a GPU: a graph that the GPU runs by itself.

    The call is that of `CompiledStep`. Nothing in it waits for the GPU, except that a graph is
    captured when the part of a cache in use first reaches 64, 128, 256, ... positions. Caches move
    into memory of this step, which keeps it for the next ones.

    On a CPU the same step runs uncompiled.

    Args:
        decoder: the packed decoder, its weights row by row.
        plan: the experts that run in each layer.
        n_sequences: number of sequences B.
        products: the way to multiply with experts' weights; None for the default where the decoder
            is.

    Raises:
        CannotCompile: without Triton, in bfloat16 on a GPU that does not compute in it, where the
            memory does not suffice, or if a layer is not one of this library.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: SelectionPlan,
        n_sequences: int,
        *,
        products: Products | None = None,
    ) -> None:
        weight = decoder.embedding.weight
        self.n_sequences = n_sequences
        self._decoder = decoder
        self._device = weight.device
        self._seats: list[Seat] = []
        self._busy = threading.Lock()  # tokens, logits and the memory of graphs are shared
        self._captures = weight.is_cuda
        self._has_room = True
        try:
            with compiling(), self._context():
                _check_card(weight)
                ways = products_for(weight) if products is None else products
                self._step = StaticStep(decoder, plan, ways, compiled=weight.is_cuda)
                self._tokens_B = torch.zeros(n_sequences, dtype=torch.long, device=weight.device)
                self._pool = torch.cuda.graph_pool_handle() if weight.is_cuda else None
                # Compile now, so that what cannot be compiled shows before a cache is touched.
                example = DecoderCache(decoder, n_sequences, _EXAMPLE_CAPACITY)
                self._step(self._tokens_B, *example.next_slots())
        except CannotCompile as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                raise CannotCompile(self._advice(n_sequences, _EXAMPLE_CAPACITY)) from error
            raise

    def __call__(self, tokens_B: Tensor, cache: DecoderCache) -> Tensor:
        """Append one token to each sequence of a cache; returns logits `[B, V]`."""
        with self._busy, self._context():
            self._tokens_B.copy_(tokens_B)
            seat = self._seat_of(cache) if self._has_room else None
            slots = cache.next_slots()
            if seat is None:
                logits_BV: Tensor = self._step(self._tokens_B, *slots)
                return logits_BV
            n_slots = bucket(cache.length)
            if n_slots not in seat.runs:
                run = partial(self._step, self._tokens_B, *seat.memory.up_to(n_slots))
                seat.runs[n_slots] = self._captured(run, cache)
            return seat.runs[n_slots]().clone()  # the next token overwrites it

    def _seat_of(self, cache: DecoderCache) -> Seat | None:
        """Where a cache lies; if nowhere, it takes a free place or a new one. None for no room."""
        for seat in self._seats:
            if seat.cache is cache:
                return seat
        free = [seat for seat in self._seats if seat.cache is None]
        fitting = [seat for seat in free if len(seat.memory.seen_SB) >= cache.capacity]
        if not fitting:
            self._seats = [seat for seat in self._seats if seat not in free]
            try:
                slots = empty_slots(self._decoder, cache.n_rows, bucket(cache.capacity))
            except torch.OutOfMemoryError:
                self._warn(self._advice(cache.n_rows, bucket(cache.capacity)))
                self._has_room = False
                return None
            fitting = [Seat(slots)]
            self._seats += fitting
        fitting[0].seat(cache)
        return fitting[0]

    def _captured(self, run: Run, cache: DecoderCache) -> Run:
        """A CUDA graph of a run; the run itself on a CPU, and once a capture has failed."""
        if not self._captures:
            return run
        try:
            return captured(run, self._pool)
        except torch.OutOfMemoryError:
            self._warn(self._advice(cache.n_rows, bucket(cache.capacity)))
        except RuntimeError as error:
            self._warn(" ".join(str(error).split())[:300])
        self._captures = False
        return run

    def _warn(self, reason: str) -> None:
        warnings.warn(f"decoding runs without a CUDA graph, more slowly: {reason}", stacklevel=4)

    def _advice(self, n_sequences: int, capacity: int) -> str:
        free = torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else 0
        return what_would_fit(self._decoder, n_sequences, capacity, free)

    @contextmanager
    def _context(self) -> Iterator[None]:
        """The same for compiling, capturing and running: compiled code depends on it."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            without_autocast(self._device.type),
            torch.cuda.device(self._device if self._device.type == "cuda" else -1),
        ):
            yield


def _check_card(weight: Tensor) -> None:
    """Raise a RuntimeError that says what is missing for a compiled step, if anything is."""
    if not weight.is_cuda:
        return
    if find_spec("triton") is None:
        raise RuntimeError("Triton is missing: pip install triton")
    if weight.dtype == torch.bfloat16 and half_of(weight.device) == torch.float16:
        capability = torch.cuda.get_device_capability(weight.device)
        raise RuntimeError(
            f"{torch.cuda.get_device_name(weight.device)} does not compute in bfloat16 "
            f"(compute capability {'.'.join(map(str, capability))}, 8.0 does): "
            "try .to(torch.float16)"
        )

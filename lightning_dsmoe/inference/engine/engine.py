"""Running a packed decoder with one of three methods, by the number of tokens.

Shapes: B sequences in a batch, T new positions, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder, DecoderOutput
from lightning_dsmoe.inference.engine.batched.forward import forward_tokens
from lightning_dsmoe.inference.engine.cache import DecoderCache, gathered
from lightning_dsmoe.inference.engine.decode.beside import leave_a_core
from lightning_dsmoe.inference.engine.decode.compiled_step import (
    COMPILING,
    CannotCompile,
    CompiledStep,
    NotReady,
)
from lightning_dsmoe.inference.engine.decode.kernel_source import KernelSource
from lightning_dsmoe.inference.engine.decode.step_sizes import group_sizes, sizes_for
from lightning_dsmoe.inference.engine.decode_cuda.step import CudaStep
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints, here
from lightning_dsmoe.inference.engine.weights.packing import tile_weights
from lightning_dsmoe.routing import SelectionPlan


class Engine:
    """Runs a packed decoder with one of three methods, by the number of tokens.

    Single new tokens of a few sequences take a compiled step that gathers the weights of the chosen
    experts. Everything else runs all experts under gates of zero ("masked"), or each expert on its
    own tokens ("grouped").

    Args:
        decoder: the packed decoder.
        switch_points: where one method gives way to the next.
        max_tokens: tokens of a batch of prompts that are read at once; longer prompts are read in
            pieces, so that memory for activations is bounded.

    Raises:
        ValueError: if a switch point is negative.
    """

    def __init__(
        self, decoder: Decoder, switch_points: SwitchPoints, *, max_tokens: int = 2048
    ) -> None:
        if min(switch_points.gather_up_to, switch_points.grouped_from) < 0:
            raise ValueError(f"switch points must be 0 or more, got {switch_points}")
        self.decoder = decoder
        self.given_points = switch_points
        self.max_tokens = max_tokens
        self.can_compile = True
        self._failure: str | None = None
        self._steps: dict[tuple[SelectionPlan, int], CompiledStep | CudaStep | None] = {}
        self._kernels = KernelSource()
        self._layouts: dict[bool, Decoder] = {}

    @property
    def switch_points(self) -> SwitchPoints:
        """The switch points that hold where the decoder is."""
        return here(self.given_points, self.decoder)

    def forward(
        self,
        tokens_BT: Tensor,
        plan: SelectionPlan,
        *,
        mask: Tensor | None = None,
        cache: DecoderCache | None = None,
        only_last: bool = False,
    ) -> DecoderOutput:
        """Logits and routings of new tokens, as `Decoder.forward` gives them."""
        with torch.autocast(tokens_BT.device.type, enabled=False), leave_a_core():
            return forward_tokens(
                self.decoder,
                tokens_BT,
                plan,
                grouped=tokens_BT.numel() >= max(1, self.switch_points.grouped_from),
                mask=mask,
                caches=None if cache is None else cache.layers,
                only_last=only_last,
            )

    def compiled_step(
        self, plan: SelectionPlan, n_sequences: int
    ) -> CompiledStep | CudaStep | None:
        """The step compiled for a plan, at its first use; None where it cannot be compiled.

        It is that of the next larger number of sequences for which steps are made. One that has
        failed is tried again.
        """
        key = plan, sizes_for(plan, n_sequences)[0]
        if self._steps.get(key) is None:
            with COMPILING:
                self._prepare(key, wait=True)
        return self._steps[key]

    def ready_step(self, plan: SelectionPlan, n_sequences: int) -> CompiledStep | CudaStep | None:
        """The step compiled for a plan if it is there; if not, another process compiles it.

        Until it is ready, the answer is one for more sequences if that is there, and otherwise
        None. What another process cannot be given, such as a router of the main program, is
        compiled now, and so is everything on a GPU.
        """
        keys = [(plan, size) for size in sizes_for(plan, n_sequences)]
        key = keys[0]
        if self.can_compile and key not in self._steps and COMPILING.acquire(blocking=False):
            try:
                if key not in self._steps:
                    self._prepare(key, wait=False)
            finally:
                COMPILING.release()
        return next((step for each in keys if (step := self._steps.get(each))), None)

    def _prepare(self, key: tuple[SelectionPlan, int], *, wait: bool) -> None:
        """Add a step to `_steps`, None if it cannot be compiled; without waiting perhaps later."""
        if self._steps.get(key) is not None:
            return
        on_cpu = self.decoder.embedding.weight.device.type == "cpu"
        if on_cpu and not wait and self._kernels.is_waiting(key):
            return
        try:
            self._steps[key] = self._new_step(key, wait=wait)
        except NotReady:
            pass
        except CannotCompile as error:
            self._steps[key] = None
            self._fail(key[1], str(error))

    def _fail(self, n_sequences: int, reason: str) -> None:
        """Tell why a step was not compiled; one of another shape, or at another time, may be.

        A reason that comes twice is one of the machine: nothing more is tried until `warm_up`.
        """
        if reason == self._failure:
            self.can_compile = False
            return
        self._failure = reason
        sequences = "1 sequence" if n_sequences == 1 else f"{n_sequences} sequences"
        warnings.warn(
            f"decoding of {sequences} runs uncompiled, more slowly: {reason}; once that is mended, "
            "warm_up compiles it, and so does a new process",
            stacklevel=3,
        )

    def _new_step(self, key: tuple[SelectionPlan, int], *, wait: bool) -> CompiledStep | CudaStep:
        plan, n_sequences = key
        if self.decoder.embedding.weight.is_cuda:  # compiled in this process, at once
            return CudaStep(self.decoder, plan, n_sequences)
        get_kernels = partial(self._kernels.get, key, wait)
        return CompiledStep(self.layout(n_sequences), plan, n_sequences, get_kernels=get_kernels)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: nothing compiled, and that another machine may compile."""
        state = {**self.__dict__, "_steps": {}, "_layouts": {}, "can_compile": True}
        del state["_kernels"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take that state, also from a pickle of version 0.1, which has no `max_tokens`."""
        self.__init__(state["decoder"], state["given_points"])  # type: ignore[misc]
        self.max_tokens = state.get("max_tokens", self.max_tokens)

    def layout(self, n_sequences: int) -> Decoder:
        """The decoder with its weights laid out for a compiled step of so many sequences."""
        several = n_sequences > 1
        if several not in self._layouts:
            self._layouts[several] = tile_weights(self.decoder, n_sequences)
        return self._layouts[several]

    def warm_up(self, plan: SelectionPlan, *n_sequences: int) -> None:
        """Compile now what decoding so many sequences needs, also if that has failed before."""
        self.can_compile, self._failure = True, None
        numbers = [n for n in n_sequences if self.gathers(plan, n)]
        groups = {size for n in numbers for size in group_sizes(plan, n)}
        for size in sorted({sizes_for(plan, n)[0] for n in groups}):
            if self.can_compile:
                self.compiled_step(plan, size)

    def start_warm_up(self, plan: SelectionPlan, n_sequences: int) -> bool:
        """Begin to compile that, and say whether decoding runs uncompiled until it is ready."""
        if not self.gathers(plan, n_sequences):
            return False
        keys = {(plan, sizes_for(plan, n)[0]) for n in group_sizes(plan, n_sequences)}
        for key in keys:
            self.ready_step(*key)
        return self.can_compile and not keys <= self._steps.keys()

    def open(self, batch_size: int, capacity: int, plan: SelectionPlan) -> "EngineReader":
        """Start sequences under a plan, with room for `capacity` tokens each.

        Raises:
            ValueError: if the model has fewer learned positions.
        """
        positions = self.decoder.max_positions
        if positions is not None and capacity > positions:
            raise ValueError(f"{capacity} tokens, but this model has {positions} learned positions")
        caches = [
            DecoderCache(self.decoder, n, capacity) for n in self._group_sizes(plan, batch_size)
        ]
        return EngineReader(self, caches, plan)

    def join(self, readers: "Sequence[EngineReader]", room: int) -> "EngineReader":
        """Go on with the sequences of several readers together, one after the other.

        Args:
            readers: readers under one plan, which are not used any more.
            room: tokens that each sequence may still read.

        Raises:
            ValueError: if a reader has read nothing.
        """
        if not all(reader.length for reader in readers):
            raise ValueError("a reader that has read nothing cannot be joined")
        sequences = [each for reader in readers for each in reader.sequences]
        plan = readers[0].plan
        return EngineReader(self, self.grouped(sequences, room, plan), plan)

    def grouped(
        self, sequences: "Sequence[tuple[DecoderCache, int]]", room: int, plan: SelectionPlan
    ) -> list[DecoderCache]:
        """Caches of sequences of others, each for as many as one step decodes."""
        left = iter(sequences)
        return [
            gathered(self.decoder, list(islice(left, size)), room)
            for size in self._group_sizes(plan, len(sequences))
        ]

    def _group_sizes(self, plan: SelectionPlan, batch_size: int) -> list[int]:
        return group_sizes(plan, batch_size) if self.gathers(plan, batch_size) else [batch_size]

    def gathers(self, plan: SelectionPlan, batch_size: int) -> bool:
        """Whether single tokens of so many sequences take compiled steps, there or yet to come."""
        if batch_size > self.switch_points.gather_up_to:
            return False
        return self.can_compile or all(
            any(self._steps.get((plan, size)) for size in sizes_for(plan, n))
            for n in group_sizes(plan, batch_size)
        )


class EngineReader:
    """Sequences that an engine reads, with their KV caches.

    Args:
        engine: the engine.
        caches: empty caches, each for some of the sequences.
        plan: the experts that run.
    """

    def __init__(self, engine: Engine, caches: list[DecoderCache], plan: SelectionPlan) -> None:
        self._engine = engine
        self._caches = caches
        self.plan = plan
        self._gathers = engine.gathers(plan, self.n_sequences)

    @property
    def sequences(self) -> list[tuple[DecoderCache, int]]:
        """Where each sequence is: its cache, and its number in there."""
        return [(cache, at) for cache in self._caches for at in range(cache.batch_size)]

    @property
    def n_sequences(self) -> int:
        """Sequences being read."""
        return len(self.sequences)

    @property
    def length(self) -> int:
        """Positions read, padding included; those of the longest where sequences were joined."""
        return max(cache.length for cache in self._caches)

    def keep(self, sequences: Sequence[int]) -> None:
        """Go on with some of the sequences only, by their numbers, in this order.

        Raises:
            ValueError: if there is none left.
        """
        if not sequences:
            raise ValueError("a reader needs a sequence or more")
        room = max(cache.capacity - cache.length for cache in self._caches)
        all_of_them = self.sequences
        self._caches = self._engine.grouped([all_of_them[at] for at in sequences], room, self.plan)
        self._gathers = self._engine.gathers(self.plan, len(sequences))

    @torch.inference_mode()
    def read(self, tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Read new tokens and give the logits `[B, V]` of the one after them.

        Args:
            tokens_BT: new tokens, one or more.
            mask_BT: false for padding, on the left of what is read first; None for no padding.
        """
        sizes = [cache.batch_size for cache in self._caches]
        masks = [None] * len(sizes) if mask_BT is None else mask_BT.split(sizes)
        parts = zip(tokens_BT.split(sizes), masks, self._caches, strict=True)
        logits = [self._read(*part) for part in parts]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _read(self, tokens_BT: Tensor, mask_BT: Tensor | None, cache: DecoderCache) -> Tensor:
        batch_size, length = tokens_BT.shape
        if self._gathers and length == 1 and cache.length and mask_BT is None:
            step = self._engine.ready_step(self.plan, batch_size)
            if step is not None:
                cache.pad_to(step.n_sequences)
                tokens_B = tokens_BT[:, 0]
                if step.n_sequences > batch_size:
                    tokens_B = tokens_B[cache.sequence_of_row]
                return step(tokens_B, cache)[:batch_size]
        cache.pad_to(batch_size)
        chunk = max(1, self._engine.max_tokens // batch_size)
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            logits = self._engine.forward(
                tokens_BT[:, part],
                self.plan,
                mask=None if mask_BT is None else mask_BT[:, part],
                cache=cache,
                only_last=True,
            ).logits
        return logits[:, -1]

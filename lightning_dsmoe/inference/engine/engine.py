"""Running a packed decoder with one of three methods, by the number of tokens.

Shapes: B sequences in a batch, T new positions, V vocabulary.
"""

import threading
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder, DecoderOutput
from lightning_dsmoe.inference.engine.batched.forward import forward_tokens
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode.compiled_step import (
    CannotCompile,
    CompiledStep,
    NotReady,
)
from lightning_dsmoe.inference.engine.decode.kernel_source import KernelSource
from lightning_dsmoe.inference.engine.decode_cuda.step import CudaStep
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints, here
from lightning_dsmoe.inference.engine.weights.packing import tile_weights
from lightning_dsmoe.routing import SelectionPlan

# A compiled step is unrolled over its sequences, and the more there are, the fewer experts are
# needed by none: a plan that runs half of the parameters leads its dense twin by a factor of 1.9
# with one sequence and 1.07 with 16 of random tokens (docs/lab_notes/batched.md).
_MAX_STEP_SEQUENCES = 16
_COMPILING = threading.Lock()  # PyTorch exports one program at a time


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
        with torch.autocast(tokens_BT.device.type, enabled=False):
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
        """The step compiled for a plan, at its first use; None where it cannot be compiled."""
        key = plan, n_sequences
        if key not in self._steps:
            with _COMPILING:
                self._prepare(key, wait=True)
        return self._steps[key]

    def ready_step(self, plan: SelectionPlan, n_sequences: int) -> CompiledStep | CudaStep | None:
        """The step compiled for a plan if it is there; if not, another process compiles it.

        None is the answer until it is ready. What another process cannot be given, such as a router
        of the main program, is compiled now, and so is everything on a GPU.
        """
        key = plan, n_sequences
        if key not in self._steps and _COMPILING.acquire(blocking=False):
            try:
                self._prepare(key, wait=False)
            finally:
                _COMPILING.release()
        return self._steps.get(key)

    def _prepare(self, key: tuple[SelectionPlan, int], *, wait: bool) -> None:
        """Add a step to `_steps`, None if it cannot be compiled; without waiting perhaps later."""
        if key in self._steps:
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
            if self.can_compile:
                message = f"decoding runs uncompiled, more slowly: {error}"
                warnings.warn(message, stacklevel=2)
            self.can_compile = False

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

    def warm_up(self, plan: SelectionPlan, n_sequences: int) -> None:
        """Compile now what decoding so many sequences needs."""
        if self._gathers(n_sequences):
            for size in set(self._group_sizes(n_sequences)):
                self.compiled_step(plan, size)

    def start_warm_up(self, plan: SelectionPlan, n_sequences: int) -> bool:
        """Begin to compile that, and say whether decoding runs uncompiled until it is ready."""
        if not self._gathers(n_sequences):
            return False
        steps = [self.ready_step(plan, size) for size in set(self._group_sizes(n_sequences))]
        return self.can_compile and None in steps

    def open(self, batch_size: int, capacity: int, plan: SelectionPlan) -> "EngineReader":
        """Start sequences under a plan, with room for `capacity` tokens each.

        Raises:
            ValueError: if the model has fewer learned positions.
        """
        positions = self.decoder.max_positions
        if positions is not None and capacity > positions:
            raise ValueError(f"{capacity} tokens, but this model has {positions} learned positions")
        gathers = self._gathers(batch_size)
        sizes = self._group_sizes(batch_size) if gathers else [batch_size]
        caches = [DecoderCache(self.decoder, size, capacity) for size in sizes]
        return EngineReader(self, caches, plan, gathers=gathers)

    def _gathers(self, batch_size: int) -> bool:
        return self.can_compile and batch_size <= self.switch_points.gather_up_to

    def _group_sizes(self, batch_size: int) -> list[int]:
        """Sizes of groups, nearly equal, for which at most two steps are compiled."""
        n_groups = -(-batch_size // _MAX_STEP_SEQUENCES)
        return [(batch_size + group) // n_groups for group in range(n_groups)]


class EngineReader:
    """Sequences that an engine reads, with their KV caches.

    Args:
        engine: the engine.
        caches: empty caches, each for some of the sequences.
        plan: the experts that run.
        gathers: whether single tokens take the compiled step.
    """

    def __init__(
        self, engine: Engine, caches: list[DecoderCache], plan: SelectionPlan, *, gathers: bool
    ) -> None:
        self._engine = engine
        self._caches = caches
        self._plan = plan
        self._gathers = gathers

    @property
    def length(self) -> int:
        """Positions read, padding included."""
        return self._caches[0].length

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
            step = self._engine.ready_step(self._plan, batch_size)
            if step is not None:
                return step(tokens_BT[:, 0], cache)
        chunk = max(1, self._engine.max_tokens // batch_size)
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            logits = self._engine.forward(
                tokens_BT[:, part],
                self._plan,
                mask=None if mask_BT is None else mask_BT[:, part],
                cache=cache,
                only_last=True,
            ).logits
        return logits[:, -1]

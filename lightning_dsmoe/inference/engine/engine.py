"""One way of running a packed decoder for every number of tokens.

Shapes: B batch, T new tokens, V vocabulary.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder, DecoderOutput
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.compiled import CannotCompile, CompiledStep
from lightning_dsmoe.inference.engine.many import run_many
from lightning_dsmoe.inference.engine.packing import tiled
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints, here
from lightning_dsmoe.routing import SelectionPlan

_CHUNK = 2048
_AT_ONCE = 16


class Engine:
    """Runs a packed decoder by the fastest of three ways.

    Args:
        decoder: the packed decoder.
        switch_points: where one way gives way to the next, if measured here.
    """

    def __init__(self, decoder: Decoder, switch_points: SwitchPoints) -> None:
        self.decoder = decoder
        self.switch_points = here(switch_points, decoder)
        self._steps: dict[tuple[SelectionPlan, int], CompiledStep] = {}
        self._tiled: Decoder | None = None
        self._cannot_compile = False

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
        return run_many(
            self.decoder,
            tokens_BT,
            plan,
            grouped=tokens_BT.numel() >= max(1, self.switch_points.grouped_from),
            mask=mask,
            caches=None if cache is None else cache.layers,
            only_last=only_last,
        )

    def compiled_step(self, plan: SelectionPlan, n_sequences: int) -> CompiledStep | None:
        """The compiled step for a plan, made at its first use; None where there is none."""
        if self._cannot_compile:
            return None
        key = plan, n_sequences
        if key not in self._steps:
            try:
                self._steps[key] = CompiledStep(self.layout(n_sequences), plan, n_sequences)
            except CannotCompile as error:
                self._cannot_compile = True
                warnings.warn(f"decoding runs uncompiled, more slowly: {error}", stacklevel=2)
                return None
        return self._steps[key]

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: nothing compiled."""
        return {**self.__dict__, "_steps": {}, "_tiled": None}

    def layout(self, n_sequences: int) -> Decoder:
        """The decoder with its weights as the compiled step likes them."""
        if n_sequences == 1:
            return self.decoder
        if self._tiled is None:
            self._tiled = tiled(self.decoder)
        return self._tiled

    def open(self, batch_size: int, capacity: int, plan: SelectionPlan) -> "EngineContext":
        """Start sequences under a plan, with room for `capacity` tokens each."""
        sizes = [batch_size]
        gathers = batch_size <= self.switch_points.gather_up_to
        if gathers:
            groups = -(-batch_size // _AT_ONCE)
            sizes = [(batch_size + group) // groups for group in range(groups)]
        caches = [DecoderCache(self.decoder, size, capacity) for size in sizes]
        return EngineContext(self, caches, plan, gathers=gathers)


class EngineContext:
    """A context of an engine.

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
        """Tokens read, padding included."""
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
            step = self._engine.compiled_step(self._plan, batch_size)
            if step is not None:
                return step(tokens_BT[:, 0], cache)
        chunk = max(1, _CHUNK // batch_size)
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

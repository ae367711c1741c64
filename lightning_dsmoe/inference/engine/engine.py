"""One way of running a packed decoder for every number of tokens.

Shapes: B batch, T new tokens, V vocabulary.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder, DecoderOutput
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.compiled import CannotCompile, CompiledStep
from lightning_dsmoe.inference.engine.many import run_many
from lightning_dsmoe.routing import SelectionPlan

_CHUNK = 1024


class SwitchPoints(NamedTuple):
    """Numbers of tokens at which one way of running experts gives way to the next.

    Args:
        gather_up_to: most sequences that decode with the compiled step, which reads each chosen
            expert once; it is compiled for a number of sequences when that is first met.
            0 compiles nothing.
        grouped_from: fewest tokens for which each expert runs on its own tokens only; below, all
            experts run on all tokens, those not chosen under gates of zero.
    """

    gather_up_to: int = 8
    grouped_from: int = 9


class Engine:
    """Runs a packed decoder by the fastest of three ways.

    Args:
        decoder: the packed decoder.
        switch_points: where one way gives way to the next.
    """

    def __init__(self, decoder: Decoder, switch_points: SwitchPoints) -> None:
        self.decoder = decoder
        self.switch_points = switch_points
        self._steps: dict[tuple[SelectionPlan, int], CompiledStep] = {}
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
            grouped=tokens_BT.numel() >= self.switch_points.grouped_from,
            mask=mask,
            caches=None if cache is None else cache.layers,
            only_last=only_last,
        )

    def compiled_step(self, plan: SelectionPlan, n_sequences: int) -> CompiledStep | None:
        """The compiled step for a plan, made at its first use; None where there is none."""
        if n_sequences > self.switch_points.gather_up_to or self._cannot_compile:
            return None
        key = plan, n_sequences
        if key not in self._steps:
            try:
                self._steps[key] = CompiledStep(self.decoder, plan, n_sequences)
            except CannotCompile as error:
                self._cannot_compile = True
                warnings.warn(f"decoding runs uncompiled, more slowly: {error}", stacklevel=2)
                return None
        return self._steps[key]

    def open(self, batch_size: int, capacity: int, plan: SelectionPlan) -> "EngineContext":
        """Start sequences under a plan, with room for `capacity` tokens each."""
        return EngineContext(self, DecoderCache(self.decoder, batch_size, capacity), plan)


class EngineContext:
    """A context of an engine.

    Args:
        engine: the engine.
        cache: an empty cache.
        plan: the experts that run.
    """

    def __init__(self, engine: Engine, cache: DecoderCache, plan: SelectionPlan) -> None:
        self._engine = engine
        self._cache = cache
        self._plan = plan

    @property
    def length(self) -> int:
        """Tokens read, padding included."""
        return self._cache.length

    @torch.inference_mode()
    def read(self, tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Read new tokens and give the logits `[B, V]` of the one after them.

        Args:
            tokens_BT: new tokens.
            mask_BT: false for padding, on the left of what is read first; None for no padding.
        """
        batch_size, length = tokens_BT.shape
        if length == 1 and self.length and mask_BT is None:
            step = self._engine.compiled_step(self._plan, batch_size)
            if step is not None:
                return step(tokens_BT[:, 0], self._cache)
        logits_BV = tokens_BT.new_zeros(0)
        chunk = max(1, _CHUNK // batch_size)
        for start in range(0, length, chunk):
            stop = start + chunk
            logits_BV = self._engine.forward(
                tokens_BT[:, start:stop],
                self._plan,
                mask=None if mask_BT is None else mask_BT[:, start:stop],
                cache=self._cache,
                only_last=True,
            ).logits[:, -1]
        return logits_BV

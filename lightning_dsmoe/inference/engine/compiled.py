"""The compiled decode step.

Shapes: T sequences, one new token of each; V vocabulary.
"""

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.rows import Int8Rows
from lightning_dsmoe.inference.engine.step import Step, decode_step
from lightning_dsmoe.routing import SelectionPlan

CompiledStep = Callable[[Tensor, DecoderCache], Tensor]
_EXAMPLE_CAPACITY = 192
_EXAMPLE_LENGTH = 100


class CannotCompile(RuntimeError):
    """The compiler is missing or refuses; everything works without it, more slowly."""


def compile_step(decoder: Decoder, plan: SelectionPlan, n_sequences: int) -> CompiledStep:
    """Compile one decode step of a packed decoder for a plan and a number of sequences.

    The compiler's results are kept in `~/.cache/lightning_dsmoe`, or where TORCHINDUCTOR_CACHE_DIR
    says, so that the next process starts in seconds.

    Returns:
        A function of new tokens `[T]` and a cache, to which it adds them, that gives logits
        `[T, V]`.

    Raises:
        CannotCompile: if there is no working compiler.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache_folder()))
    for module in decoder.modules():
        if isinstance(module, Int8Rows):
            module.join_codes()

    def step(tokens_T: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Step:
        return decode_step(decoder, plan, tokens_T, keys, values, seen)

    compiled = torch.compile(
        step,
        fullgraph=True,
        isolate_recompiles=True,
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
    )

    @torch.inference_mode()
    def call(tokens_T: Tensor, cache: DecoderCache) -> Tensor:
        logits_TV, keys, values = compiled(tokens_T, *cache.used())
        cache.append(keys, values)
        return logits_TV

    try:
        _trace(compiled, decoder, n_sequences)
    except Exception as error:
        raise CannotCompile(str(error).splitlines()[0]) from error
    return call


@torch.inference_mode()
def _trace(compiled: Callable[..., Step], decoder: Decoder, n_sequences: int) -> None:
    """Compile by a first call, with the length of the cache left open."""
    cache = DecoderCache(decoder, n_sequences, _EXAMPLE_CAPACITY)
    for layer in cache.layers:
        layer.length = _EXAMPLE_LENGTH
    cache.seen[:, :_EXAMPLE_LENGTH] = True
    keys, values, seen = cache.used()
    torch._dynamo.mark_dynamic(keys, 3)
    torch._dynamo.mark_dynamic(values, 3)
    torch._dynamo.mark_dynamic(seen, 1)
    tokens_T = torch.zeros(n_sequences, dtype=torch.long, device=keys.device)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled(tokens_T, keys, values, seen)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lightning_dsmoe" / "compiled"

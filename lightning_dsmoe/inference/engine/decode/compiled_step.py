"""The compiled decode step.

Shapes: B sequences, one new token of each; S positions so far (slots of the cache in use), D model
width, V vocabulary.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode import aot_cache
from lightning_dsmoe.inference.engine.decode.aot_cache import Kernel, Part, tensors_of
from lightning_dsmoe.inference.engine.decode.same_graph import kinds_of
from lightning_dsmoe.inference.engine.decode.step import BlockStep, EmbedStep, PredictStep
from lightning_dsmoe.routing import SelectionPlan

EXAMPLE_CAPACITY = 64  # of the cache that graphs are traced with; they take any


class CannotCompile(RuntimeError):
    """The compiler is missing or refuses; everything works without it, more slowly."""


@contextmanager
def compiling() -> Iterator[None]:
    """What tracing and compiling need around them.

    The caller's autocast would become part of a graph, and of the name of its kernel.

    Raises:
        CannotCompile: if anything goes wrong.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
            yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CannotCompile(reason[:300]) from error


class CompiledStep:
    """One new token of each of a few sequences: the embedding, each block, and the head, compiled.

    Blocks that differ in their weights alone share one kernel: 12 s to compile rather than 110 s
    for the whole model (docs/lab_notes/decoding.md). Kernels are kept on disk, so that the next
    process starts in seconds.

    Args:
        decoder: the packed decoder.
        plan: the experts that run in each layer.
        n_sequences: number of sequences B.

    Raises:
        CannotCompile: if there is no working compiler, or a layer is not one of this library.
    """

    def __init__(self, decoder: Decoder, plan: SelectionPlan, n_sequences: int) -> None:
        selections = list(zip(*decoder.selections(plan), strict=True))
        blocks = list(cast(Iterable[Block], decoder.blocks))
        with compiling():
            steps = [BlockStep(b, *some) for b, some in zip(blocks, selections, strict=True)]
            # Blocks of a kind have the same graph, of which one is traced: tracing takes seconds.
            kinds = kinds_of(steps)
            embed, predict = EmbedStep(decoder), PredictStep(decoder)
            slots = DecoderCache(decoder, n_sequences, EXAMPLE_CAPACITY).next_slots()
            tokens_B = torch.zeros(n_sequences, dtype=torch.long, device=slots.at_1.device)
            x_BD, *angles = embed(tokens_B, slots.seen_SB)

            def block_part(at: int) -> Part:
                place = (slots.seen_SB, slots.at_1, *angles[embed.angles_of[at]])
                inputs = (x_BD, slots.keys[at], slots.values[at], *place)
                return Part(steps[at], inputs, frozenset({1, 2, 3}))

            parts: dict[object, Part] = {
                "embed": Part(embed, (tokens_B, slots.seen_SB), frozenset({1})),
                **{kind: block_part(kind) for kind in kinds},
                "predict": Part(predict, (x_BD,), frozenset()),
            }
            sequences = "1 sequence" if n_sequences == 1 else f"{n_sequences} sequences"
            kernels = kernels_of(parts, f"decoding of {sequences}", tokens_B.device)
        self._embed, self._embed_weights = kernels["embed"], tensors_of(embed)
        self._blocks = [
            (kernels[kind], tensors_of(step), own)
            for kind, step, own in zip(kinds, steps, embed.angles_of, strict=True)
        ]
        self._predict, self._predict_weights = kernels["predict"], tensors_of(predict)

    @torch.inference_mode()
    def __call__(self, tokens_B: Tensor, cache: DecoderCache) -> Tensor:
        """Append one token to each sequence of a cache; returns logits `[B, V]`."""
        slots = cache.next_slots()
        tokens_B = tokens_B.long().contiguous()  # a kernel reads memory without checks
        x_BD, *angles = self._embed([tokens_B, slots.seen_SB, *self._embed_weights])
        place = (slots.seen_SB, slots.at_1)
        for (run, weights, own), keys, values in zip(
            self._blocks, slots.keys, slots.values, strict=True
        ):
            (x_BD,) = run([x_BD, keys, values, *place, *angles[own], *weights])
        (logits_BV,) = self._predict([x_BD, *self._predict_weights])
        return logits_BV


def kernels_of(parts: dict[object, Part], what: str, device: torch.device) -> dict[object, Kernel]:
    """Load the parts' kernels, compiling those that are new to this machine.

    Args:
        parts: the parts, by any names.
        what: what the user is told is compiled.
        device: where they run.
    """
    aot_cache.ensure_private_folder(aot_cache.kernel_folder())
    programs = {name: aot_cache.export_part(part) for name, part in parts.items()}
    paths = {name: aot_cache.kernel_path(program) for name, program in programs.items()}
    loaded = {path: kernel for path in paths.values() if (kernel := _loaded(path, device))}
    missing = {path: programs[name] for name, path in paths.items() if path not in loaded}
    if missing:
        title = f"Compiling {what}, once for this machine"
        for path in track(missing, title, console=Console(stderr=True)):
            aot_cache.compile_kernel(missing[path], path)
            loaded[path] = aot_cache.load_kernel(path, device)
    return {name: loaded[path] for name, path in paths.items()}


def _loaded(path: Path, device: torch.device) -> Kernel | None:
    """A kernel from disk; None if there is none, it is damaged, or others can write to it."""
    try:
        return aot_cache.load_kernel(path, device)
    except Exception:  # a new one takes its place, whatever is wrong with it
        return None

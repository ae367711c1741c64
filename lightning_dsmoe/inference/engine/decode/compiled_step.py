"""The compiled decode step.

Shapes: B sequences, one new token of each; S positions so far (slots of the cache in use), D model
width, V vocabulary.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.fork_safe_lock import ForkSafeLock
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode import aot_cache, kernel_index
from lightning_dsmoe.inference.engine.decode.aot_cache import Kernel, Part, tensors_of
from lightning_dsmoe.inference.engine.decode.same_graph import kinds_of
from lightning_dsmoe.inference.engine.decode.selection_inputs import free_sizes, with_inputs
from lightning_dsmoe.inference.engine.decode.step import BlockStep, EmbedStep, PredictStep
from lightning_dsmoe.routing import SelectionPlan

EXAMPLE_CAPACITY = 64  # of the cache that graphs are traced with; they take any
COMPILING = ForkSafeLock()
"""Held by whoever traces or compiles: PyTorch exports one program at a time."""

GetKernels = Callable[[dict[object, Part], str, torch.device], dict[object, Kernel]]


class CannotCompile(RuntimeError):
    """The compiler is missing or refuses; everything works without it, more slowly."""


class NotReady(Exception):
    """Another process is compiling."""


@contextmanager
def compiling() -> Iterator[None]:
    """What tracing and compiling need around them.

    The caller's autocast would become part of a graph, and of the name of its kernel.

    Raises:
        CannotCompile: if anything goes wrong but what is not ready.
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
    except NotReady:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CannotCompile(reason[:300]) from error


class StepParts(NamedTuple):
    """A step of decoding, taken apart into what is compiled.

    Args:
        blocks: the step of each block.
        kinds: for each block the number of the first one with the same graph.
        embed: the first part of a step.
        predict: the last part.
        parts: what is compiled: "embed", "predict" and the number of each kind of blocks.
    """

    blocks: list[BlockStep]
    kinds: list[int]
    embed: EmbedStep
    predict: PredictStep
    parts: dict[object, Part]


class CompiledStep:
    """One new token of each of a few sequences: the embedding, each block, and the head, compiled.

    Blocks that differ in their weights alone share one kernel: 12 s to compile rather than 110 s
    for the whole model (docs/lab_notes/decoding.md). Kernels are kept on disk, so that the next
    process starts in seconds.

    Args:
        decoder: the packed decoder.
        plan: the experts that run in each layer.
        n_sequences: number of sequences B.
        get_kernels: gives the kernels of its parts; `kernels_of` unless given.

    Raises:
        CannotCompile: if there is no working compiler, or a layer is not one of this library.
        NotReady: if `get_kernels` raises it.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: SelectionPlan,
        n_sequences: int,
        *,
        get_kernels: GetKernels | None = None,
    ) -> None:
        self.n_sequences = n_sequences
        with compiling():
            steps, kinds, embed, predict, parts = step_parts(decoder, plan, n_sequences)
            sequences = "1 sequence" if n_sequences == 1 else f"{n_sequences} sequences"
            device = decoder.embedding.weight.device
            kernels = (get_kernels or kernels_of)(parts, f"decoding of {sequences}", device)
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


def step_parts(decoder: Decoder, plan: SelectionPlan, n_sequences: int) -> StepParts:
    """Take a step apart into what is compiled; to be called under `compiling`.

    Args:
        decoder: the packed decoder.
        plan: the experts that run in each layer.
        n_sequences: number of sequences B.
    """
    selections = zip(*decoder.selections(plan), strict=True)
    blocks = cast(Iterable[Block], decoder.blocks)
    steps = [
        BlockStep(block, *(with_inputs(each, n_sequences) for each in some))
        for block, some in zip(blocks, selections, strict=True)
    ]
    # Blocks of a kind have the same graph, of which one is traced: tracing takes seconds.
    kinds = kinds_of(steps)
    embed, predict = EmbedStep(decoder), PredictStep(decoder)
    slots = DecoderCache(decoder, n_sequences, EXAMPLE_CAPACITY).next_slots()
    tokens_B = torch.zeros(n_sequences, dtype=torch.long, device=slots.at_1.device)
    x_BD, *angles = embed(tokens_B, slots.seen_SB)

    def block_part(at: int) -> Part:
        place = (slots.seen_SB, slots.at_1, *angles[embed.angles_of[at]])
        inputs = (x_BD, slots.keys[at], slots.values[at], *place)
        return Part(steps[at], inputs, frozenset({1, 2, 3}), free_sizes(steps[at]))

    parts: dict[object, Part] = {
        "embed": Part(embed, (tokens_B, slots.seen_SB), frozenset({1})),
        **{kind: block_part(kind) for kind in kinds},
        "predict": Part(predict, (x_BD,), frozenset()),
    }
    return StepParts(steps, kinds, embed, predict, parts)


def kernels_of(parts: dict[object, Part], what: str, device: torch.device) -> dict[object, Kernel]:
    """Load the parts' kernels, compiling those that are new to this machine.

    Args:
        parts: the parts, by any names.
        what: what the user is told is compiled.
        device: where they run.
    """
    title = f"Compiling {what}, once for this machine"
    paths = compile_parts(list(parts.values()), title)
    if (name_of_parts := kernel_index.name_of(list(parts.values()))) is not None:
        kernel_index.keep(name_of_parts, [path.name for path in paths])
    loaded = {path: aot_cache.load_kernel(path, device) for path in dict.fromkeys(paths)}
    return {name: loaded[path] for name, path in zip(parts, paths, strict=True)}


def compile_parts(parts: Sequence[Part], title: str | None = None) -> list[Path]:
    """Compile the parts whose kernels are new to this machine, and say where the kernels are.

    Args:
        parts: the parts.
        title: what the user is told meanwhile; None for nothing.
    """
    aot_cache.ensure_private_folder(aot_cache.kernel_folder())
    programs = [aot_cache.export_part(part) for part in parts]
    paths = [aot_cache.kernel_path(program) for program in programs]
    by_path = dict(zip(paths, programs, strict=True))
    device = parts[0].inputs[0].device
    missing = {path: program for path, program in by_path.items() if not _loads(path, device)}
    if missing:
        for path in track(missing, title or "", console=Console(stderr=True, quiet=not title)):
            aot_cache.compile_kernel(missing[path], path)
    return paths


def _loads(path: Path, device: torch.device) -> bool:
    """Whether there is a kernel; a new one replaces what is damaged, or others can write to."""
    try:
        aot_cache.load_kernel(path, device)
    except Exception:  # whatever is wrong with it
        return False
    return True

"""The paper's throughput table on this card, for `python -m benchmarks.gpu --part paper`.

Shapes: B sequences, T tokens.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.gpu.engines import EngineReader, packed_on
from benchmarks.gpu.peers import DEEPSEEK_MOE_16B, MISTRAL_7B, QWEN_MOE_A2_7B, peer
from benchmarks.gpu.record import Measurement, Row, in_one_line, tidy_up
from benchmarks.gpu.sides import made_on, paper_models
from benchmarks.speed.decoding import Decoding, Reader
from benchmarks.speed.peer_models import CompiledPeer, Peer
from benchmarks.speed.sparse_models import hidden_share
from benchmarks.timing import seconds_per_call
from lightning_dsmoe import SelectionPlan

NOTES = (
    "bfloat16, random weights and text. Input: prompts of 256 tokens read together, in the best "
    "number. Latency: one token more of one sequence. Decoding: one token more of each sequence, "
    "of 256 to 320 tokens, in the largest batch that fits when doubled, and in the best. Peak: the "
    "most memory in all of this. Paper: its own figures, with card and software: transformers (its "
    "Table 5: input of 256 tokens, largest batch) or vLLM (its Table 7: 1,000 tokens in and 1,000 "
    "out, both counted), another measurement than here. DeepSeekMoE is that of transformers, with "
    "the latent attention of version 2. GB as 1e9 bytes."
)
PROMPT, STEPS, LENGTH = 256, 16, 320
FIGURES: dict[str, Row] = {
    "DS-MoE-6B": {
        "paper: input, A100, transformers": 35046.7,
        "paper: tokens/s, A100, vLLM": 3992.8,
        "paper: tokens/s, H100, vLLM": 4603.9,
        "paper: GiB": 12.6,
    },
    "Dense-6B": {
        "paper: input, A100, transformers": 18354.2,
        "paper: tokens/s, A100, vLLM": 2079.8,
        "paper: tokens/s, H100, vLLM": 2808.7,
        "paper: GiB": 12.3,
    },
    "DS-MoE-3B": {"paper: input, A100, transformers": 61515.9},
    "Dense-3B": {"paper: input, A100, transformers": 40854.5},
    "Mistral-7B": {
        "paper: tokens/s, A100, vLLM": 2140.8,
        "paper: tokens/s, H100, vLLM": 3047.4,
        "paper: GiB": 13.5,
    },
    "DeepSeekMoE-16B": {
        "paper: tokens/s, A100, vLLM": 2330.1,
        "paper: tokens/s, H100, vLLM": 3144.1,
        "paper: GiB": 30.5,
    },
    "Qwen1.5-MoE-A2.7B": {
        "paper: tokens/s, A100, vLLM": 2665.7,
        "paper: tokens/s, H100, vLLM": 3616.9,
        "paper: GiB": 26.7,
    },
}
"""Tables 5 and 7 of arXiv 2404.05567."""


class Contender(NamedTuple):
    """One model that is measured.

    Args:
        name: as the paper calls it.
        way: how it runs.
        make: makes it on a device; gives it and what makes a reader of so many tokens.
        active: share of the hidden parameters that run, None where it is not told.
        only_latency: leaves out what would be compiled anew for each batch size.
    """

    name: str
    way: str
    make: Callable[[torch.device], tuple[nn.Module, Callable[[], Reader]]]
    active: float | None = None
    only_latency: bool = False


def contenders() -> list[Contender]:
    """The models of the table, those that the aims are about first."""
    return [
        *_ours("6B"),
        *_theirs("Mistral-7B", "Mistral", MISTRAL_7B, compiled=True),
        *_theirs("Qwen1.5-MoE-A2.7B", "Qwen2Moe", QWEN_MOE_A2_7B),
        *_theirs("DeepSeekMoE-16B", "DeepseekV2", DEEPSEEK_MOE_16B),
        *_ours("3B"),
        *_ours("1B"),
    ]


def _ours(size: str) -> list[Contender]:
    models = paper_models(size)
    nowhere = torch.device("meta")

    def make(sparse: bool, plan: SelectionPlan, device: torch.device) -> Any:
        decoder = packed_on(device, models.sparse if sparse else models.dense)
        return decoder, partial(EngineReader, decoder, plan, LENGTH)

    sparse = made_on(nowhere, models.sparse)
    found = [
        Contender(
            f"DS-MoE-{size}", name, partial(make, True, plan), active=hidden_share(sparse, plan)
        )
        for name, plan in models.plans.items()
    ]
    dense = Contender(f"Dense-{size}", "this engine", partial(make, False, SelectionPlan()), 1.0)
    return [*found, dense]


def _theirs(
    name: str, kind: str, sizes: dict[str, Any], *, compiled: bool = False
) -> list[Contender]:
    def eager(device: torch.device) -> Any:
        model = peer(kind, sizes, device)
        return model, partial(Peer, model, most_tokens=8192)

    def static(device: torch.device) -> Any:
        model = peer(kind, sizes, device)
        mode = "reduce-overhead" if device.type == "cuda" else None
        return model, partial(CompiledPeer, model, LENGTH, mode=mode)

    found = [Contender(name, "transformers, eager", eager)]
    if compiled:
        way = "transformers, static cache, compiled"
        found.append(Contender(name, way, static, only_latency=True))
    return found


def paper(
    device: torch.device,
    until: float,
    *,
    models: Callable[[], Sequence[Contender]] = contenders,
    most_sequences: int = 4096,
    seconds: float = 25.0,
) -> list[Measurement]:
    """All figures of one model after another.

    Args:
        device: where.
        until: time by `time.monotonic()` after which no larger batch is tried.
        models: what to measure.
        most_sequences: largest batch that is tried.
        seconds: of each figure of a model, after which no larger batch is tried.
    """
    return [
        Measurement(
            {"model": each.name, "way": each.way},
            partial(_measure, each, device, until, most_sequences, seconds),
        )
        for each in models()
    ]


# More graphs than layers, of any model; and none that goes on uncompiled beyond them.
@torch.compiler.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
def _measure(
    contender: Contender, device: torch.device, until: float, most: int, seconds: float
) -> list[Row]:
    model, reader = contender.make(device)
    tidy_up()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    weights = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    row: Row = {"active": contender.active, "weights GB": sum(weights.values()) / 1e9}
    vocabulary = (
        model.get_input_embeddings().num_embeddings
        if hasattr(model, "get_input_embeddings")
        else model.vocab_size
    )

    def text(batch_size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (batch_size, LENGTH), generator=generator).to(device)

    def step(batch_size: int) -> float:
        decoding = Decoding(reader(), text(batch_size), PROMPT)
        decoding.turn(STEPS)  # warms up, and compiles
        return median(decoding.turn(STEPS) for _ in range(3 if batch_size == 1 else 1))

    def read(batch_size: int) -> float:
        prompt_BT, one = text(batch_size)[:, :PROMPT], reader()
        with torch.inference_mode():
            return min(seconds_per_call(partial(one.start, prompt_BT), 1) for _ in range(3))

    row["latency, ms"] = 1e3 * step(1)
    if not contender.only_latency:
        ends = partial(min, until)
        reading = doubled(read, most=most, until=ends(time.monotonic() + seconds), enough=1.02)
        row["input tokens/s"] = max(
            (n * PROMPT / s for n, s in reading.seconds.items()), default=None
        )
        decoding = doubled(step, most=most, until=ends(time.monotonic() + seconds), start=16)
        rates = {size: size / taken for size, taken in decoding.seconds.items()}
        if rates:
            row["largest batch"] = max(rates)
            row["largest: tokens/s"] = rates[max(rates)]
            row["best batch"] = max(rates, key=lambda size: rates[size])
            row["best: tokens/s"] = max(rates.values())
        row["batches ended by"] = decoding.ended
    if device.type == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    return [row | FIGURES.get(contender.name, {})]


class Doubled(NamedTuple):
    """Seconds at each batch size, and why there is no larger one."""

    seconds: dict[int, float]
    ended: str


def doubled(
    measure: Callable[[int], float],
    *,
    most: int,
    until: float,
    start: int = 1,
    enough: float = 0.0,
) -> Doubled:
    """Measure at batch sizes that double until one does not fit.

    Args:
        measure: gives the seconds at a batch size.
        most: largest batch size.
        until: time by `time.monotonic()` after which no other size is tried.
        start: smallest batch size.
        enough: ends where a batch twice as large is not this many times as fast per sequence.
    """
    seconds: dict[int, float] = {}
    size, last = min(start, most), math.inf
    while size <= most:
        if seconds and time.monotonic() > until:
            return Doubled(seconds, "time")
        try:
            taken = measure(size)
        except torch.OutOfMemoryError:
            tidy_up()
            return Doubled(seconds, "memory")
        except Exception as error:  # the other figures of the model are still worth having
            return Doubled(seconds, in_one_line(error))
        seconds[size] = taken
        if last < enough * taken / size:
            return Doubled(seconds, "no gain")
        last, size = taken / size, 2 * size
    return Doubled(seconds, "the largest tried")

"""Measuring which method of running experts is the fastest at which batch size.

Shapes: B sequences in a batch, T positions.
"""

import time
from collections.abc import Sequence
from itertools import takewhile
from statistics import median

import torch

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints, place_of
from lightning_dsmoe.routing import SelectionPlan

_PROMPT, _LENGTH = 4, 8
_ROUNDS = 5
_BATCH_SIZES = 1, 4, 16, 32, 64
_BATCH_SIZES_OF_A_GPU = 1, 4, 16, 64, 256, 1024, 4096
_NEVER = 2**31
# Grouped and masked are the same computation where no layer is worth grouping, and then differ by
# chance: only if it takes less than this share of the time is masked taken for the faster one.
_CLEARLY = 0.97


def tune(
    decoder: Decoder, plan: SelectionPlan, *, batch_sizes: Sequence[int] | None = None
) -> SwitchPoints:
    """Measure the time that each method takes to decode some batches of sequences.

    Args:
        decoder: the packed decoder.
        plan: the experts that run.
        batch_sizes: numbers of sequences, ascending; None for those at which methods change on
            such a device.

    Returns:
        Switch points that hold on this device, with this type and number of threads.
    """
    device = decoder.embedding.weight.device
    if batch_sizes is None:
        batch_sizes = _BATCH_SIZES if device.type == "cpu" else _BATCH_SIZES_OF_A_GPU
    engines = {
        "gathered": Engine(decoder, SwitchPoints(gather_up_to=_NEVER)),
        "grouped": Engine(decoder, SwitchPoints(gather_up_to=0)),
        "masked": Engine(decoder, SwitchPoints(gather_up_to=0, grouped_from=_NEVER)),
    }
    compiled = engines["gathered"]
    if not compiled.switch_points.gather_up_to or compiled.compiled_step(plan, 1) is None:
        del engines["gathered"]
    else:
        for size in batch_sizes:
            compiled.warm_up(plan, size)
    seconds = {size: _medians(engines, plan, size) for size in batch_sizes}
    # Up to the first defeat: beyond it lies a batch size at which another method is faster.
    gathered = takewhile(
        lambda size: min(seconds[size], key=seconds[size].__getitem__) == "gathered", batch_sizes
    )
    masked = [size for size, each in seconds.items() if each["masked"] < _CLEARLY * each["grouped"]]
    return SwitchPoints(
        gather_up_to=max(gathered, default=0),
        grouped_from=max(masked, default=0) + 1,
        measured_on=place_of(decoder),
    )


def _medians(engines: dict[str, Engine], plan: SelectionPlan, batch_size: int) -> dict[str, float]:
    """Seconds of each engine, alternating between them: a slow moment of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(1 + _ROUNDS):
        for name, engine in engines.items():
            seconds[name].append(_seconds(engine, plan, batch_size))
    return {name: median(each[1:]) for name, each in seconds.items()}  # the first round warms up


def _seconds(engine: Engine, plan: SelectionPlan, batch_size: int) -> float:
    """Time of decoding a few tokens of random sequences, without that of their prompts."""
    length = min(_LENGTH, engine.decoder.max_positions or _LENGTH)
    device = engine.decoder.embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(engine.decoder.vocab_size, (batch_size, length), generator=generator)
    tokens_BT = tokens_BT.to(device)
    reader = engine.open(batch_size, length, plan)
    reader.read(tokens_BT[:, :_PROMPT])
    _wait_for(device)  # not for the prompt within what is timed
    start = time.perf_counter()
    for position in range(_PROMPT, length):
        reader.read(tokens_BT[:, position : position + 1])
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

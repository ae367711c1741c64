"""Measuring which way of running experts is the fastest for how many sequences.

Shapes: B sequences, T tokens.
"""

import time
from itertools import takewhile
from statistics import median

import torch

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints, place_of
from lightning_dsmoe.routing import SelectionPlan

_SEQUENCES = (1, 4, 16, 32, 64)
_PROMPT, _LENGTH = 4, 8
_ROUNDS = 5
_NEVER = 2**31
_CLEARLY = 0.97
"""Of the time: grouped and masked are the same where no layer groups, and then differ by chance."""


def tune(decoder: Decoder, plan: SelectionPlan) -> SwitchPoints:
    """Measure the three ways of decoding 1 to 64 sequences by turns.

    Args:
        decoder: the packed decoder.
        plan: the experts that run.
    """
    ways = {
        "gathered": Engine(decoder, SwitchPoints(gather_up_to=_NEVER)),
        "grouped": Engine(decoder, SwitchPoints(gather_up_to=0)),
        "masked": Engine(decoder, SwitchPoints(gather_up_to=0, grouped_from=_NEVER)),
    }
    compiled = ways["gathered"]
    if not compiled.switch_points.gather_up_to or compiled.compiled_step(plan, 1) is None:
        del ways["gathered"]
    timed = [(n, _medians(ways, plan, n)) for n in _SEQUENCES]
    fastest = [(n, min(taken, key=taken.__getitem__)) for n, taken in timed]
    gathered = [n for n, _ in takewhile(lambda pair: pair[1] == "gathered", fastest)]
    masked = [n for n, taken in timed if taken["masked"] < _CLEARLY * taken["grouped"]]
    return SwitchPoints(
        gather_up_to=max(gathered, default=0),
        grouped_from=max(masked, default=0) + 1,
        measured_on=place_of(decoder),
    )


def _medians(ways: dict[str, Engine], plan: SelectionPlan, n_sequences: int) -> dict[str, float]:
    """Seconds of each way of decoding some sequences."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + _ROUNDS):
        for name, engine in ways.items():
            taken = _seconds(engine, plan, n_sequences)
            if number:
                seconds[name].append(taken)
    return {name: median(taken) for name, taken in seconds.items()}


def _seconds(engine: Engine, plan: SelectionPlan, n_sequences: int) -> float:
    """Time of decoding a few tokens more of sequences of random text."""
    length = min(_LENGTH, engine.decoder.max_positions or _LENGTH)
    device = engine.decoder.embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    text_BT = torch.randint(
        engine.decoder.vocab_size, (n_sequences, length), generator=generator
    ).to(device)
    context = engine.open(n_sequences, length, plan)
    context.read(text_BT[:, :_PROMPT])
    start = time.perf_counter()
    for place in range(_PROMPT, length):
        context.read(text_BT[:, place : place + 1])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

"""Measuring which way of running experts is the fastest for how many sequences.

Shapes: B sequences, T tokens.
"""

import time
from collections.abc import Callable
from itertools import takewhile
from statistics import median

import torch

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints, place_of
from lightning_dsmoe.routing import SelectionPlan

_SEQUENCES = (1, 4, 16, 32, 64)
_PROMPT = 8
_ROUNDS, _STEPS = 5, 3
_NEVER = 2**31


def calibrate(decoder: Decoder, plan: SelectionPlan) -> SwitchPoints:
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
    fastest = [_fastest(ways, plan, n_sequences) for n_sequences in _SEQUENCES]
    timed = list(zip(_SEQUENCES, fastest, strict=True))
    gathered = [n for n, _ in takewhile(lambda pair: pair[1][0] == "gathered", timed)]
    masked = [n for n, order in timed if order.index("masked") < order.index("grouped")]
    return SwitchPoints(
        gather_up_to=max(gathered, default=0),
        grouped_from=max(masked, default=0) + 1,
        measured_on=place_of(decoder),
    )


def _fastest(ways: dict[str, Engine], plan: SelectionPlan, n_sequences: int) -> list[str]:
    """The ways of decoding some sequences, the fastest first."""
    steps = {name: _step(engine, plan, n_sequences) for name, engine in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1 + _ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(_STEPS):
                step()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return sorted(steps, key=lambda name: median(seconds[name]))


def _step(engine: Engine, plan: SelectionPlan, n_sequences: int) -> Callable[[], None]:
    """Decode one token more of sequences of random text."""
    capacity = _PROMPT + (1 + _ROUNDS) * _STEPS
    device = engine.decoder.embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    text_BT = torch.randint(
        engine.decoder.vocab_size, (n_sequences, capacity), generator=generator
    ).to(device)
    context = engine.open(n_sequences, capacity, plan)
    context.read(text_BT[:, :_PROMPT])
    columns = iter(text_BT[:, _PROMPT:].split(1, dim=1))

    def step() -> None:
        context.read(next(columns))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step

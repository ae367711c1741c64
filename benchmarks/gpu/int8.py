"""Routed experts in 8 bits against bfloat16, for `python -m benchmarks.gpu --part int8`.

Codes are rounded here, in the format of bitsandbytes, which is not needed.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.gpu.engines import EngineReader, Kept
from benchmarks.gpu.record import Measurement, Row
from benchmarks.gpu.sides import Models, Side, compare_sides, made_on, paper_models
from benchmarks.speed.decoding import Decoding
from benchmarks.speed.sparse_models import active_bytes

BFLOAT16, INT8 = "bfloat16", "int8"
NOTES = (
    "Random weights and text, medians of alternating rounds. The speed ratio is to bfloat16 in the "
    "same round, above 1 where 8 bits are faster; low and high are its quartiles; bound is that "
    "ratio by the bytes of weights that one sequence needs. GB as 1e9 bytes."
)
PROMPT, STEPS, LENGTH = 64, 16, 128


def measured_shapes() -> list[Models]:
    """The shapes that are measured."""
    return [paper_models("6B"), paper_models("1B")]


def int8(
    device: torch.device,
    until: float,
    *,
    shapes: Callable[[], Sequence[Models]] = measured_shapes,
    batch_sizes: Sequence[int] = (1, 4, 16, 64),
    rounds: int = 11,
) -> list[Measurement]:
    """One token more of each of some sequences, under each plan."""
    todo = []
    for models in shapes():
        types = {
            BFLOAT16: Kept(device, models.sparse),
            INT8: Kept(device, models.sparse, "int8"),
        }
        for size in batch_sizes:
            for plan in models.plans:
                what = {"model": models.name, "plan": plan, "sequences": size}
                run = partial(_compare, models, plan, types, device, rounds, until, size)
                todo.append(Measurement(what, run))
        todo.append(Measurement({"model": models.name}, partial(_sizes, types)))
    return todo


def _compare(
    models: Models,
    plan_name: str,
    types: dict[str, Kept],
    device: torch.device,
    rounds: int,
    until: float,
    batch_size: int,
) -> list[Row]:
    plan = models.plans[plan_name]
    torch.manual_seed(0)
    text_BT = torch.randint(types[INT8].decoder.vocab_size, (batch_size, LENGTH), device=device)
    sides = {}
    for name, kept in types.items():
        reader = EngineReader(kept.decoder, plan, LENGTH)
        sides[name] = Side(kept.decoder, partial(Decoding(reader, text_BT, PROMPT).turn, STEPS))
    compared = compare_sides(sides, device, rounds=rounds, until=until)
    shape = made_on(torch.device("meta"), models.sparse)
    needed = {
        name: active_bytes(shape, plan, expert_bytes=bytes_each, other_bytes=2)
        for name, bytes_each in ((BFLOAT16, 2), (INT8, 1))
    }
    rows = []
    for name, row in compared.items():
        found: Row = {"side": name} | row
        if batch_size == 1:
            found["bound"] = needed[BFLOAT16] / needed[name]
        rows.append(found)
    return rows


def _sizes(types: dict[str, Kept]) -> list[Row]:
    """Memory of the weights; the models make room for the next ones."""
    rows = []
    for name, kept in types.items():
        tensors = [*kept.decoder.parameters(), *kept.decoder.buffers()]
        weights = {id(tensor): tensor.nbytes for tensor in tensors}
        rows.append({"side": name, "weights GB": sum(weights.values()) / 1e9})
        kept.forget()
    return rows

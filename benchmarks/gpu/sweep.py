"""Decoding 1 to 4,096 sequences, sparse over dense, for `python -m benchmarks.gpu --part sweep`.

Each batch size compares the engine as it chooses for itself with the dense twin, and with both
methods for many tokens alone: where these change places are the switch points to set.

Shapes: B sequences, T tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.gpu.engines import EngineReader, Kept, Way, host_waits
from benchmarks.gpu.record import Measurement, Row
from benchmarks.gpu.sides import Models, Side, compare_sides, made_on, paper_models
from benchmarks.speed.decoding import Decoding
from benchmarks.speed.sparse_models import hidden_share
from lightning_dsmoe import SelectionPlan

TWIN = "dense twin"
WAYS: tuple[Way, ...] = ("by itself", "masked", "grouped")
LEAST = 0.97
NOTES = (
    "bfloat16, random weights and text, medians of alternating rounds. The speed ratio is to the "
    "dense twin in the same round, above 1 where the sparse model is faster; low and high are its "
    "quartiles. By itself: as the engine chooses; masked and grouped: by that method alone. Host "
    f"waits: of one step. The aim is no ratio below {LEAST} by itself; the last rows tell the "
    "lowest. GB as 1e9 bytes."
)
PROMPT, STEPS, LENGTH = 4, 4, 16
"""Short texts, as 4,096 of them keep their keys and values four times."""


def measured_shapes() -> list[Models]:
    """The shapes that are measured, each under the last of its plans."""
    return [paper_models("1B"), paper_models("6B")]


def sweep(
    device: torch.device,
    until: float,
    *,
    shapes: Callable[[], Sequence[Models]] = measured_shapes,
    batch_sizes: Sequence[int] = (1, 4, 16, 64, 256, 1024, 4096, 2, 8, 32, 128, 512, 2048),
    rounds: int = 7,
) -> list[Measurement]:
    """One token more of each of some sequences, at many batch sizes.

    The sizes come coarse first, so that a run cut off has seen the whole range.
    """
    todo = []
    for models in shapes():
        name, plan = list(models.plans.items())[-1]
        what = {"model": models.name, "plan": name}
        sparse, dense = Kept(device, models.sparse), Kept(device, models.dense)
        found: list[Row] = []
        run = partial(_compare, sparse, dense, plan, device, rounds, until, found)
        todo += [Measurement(what | {"sequences": n}, partial(run, n)) for n in batch_sizes]
        share = hidden_share(made_on(torch.device("meta"), models.sparse), plan)
        end = partial(_lowest, found, share, (sparse, dense))
        todo.append(Measurement(what | {"sequences": "all"}, end))
    return todo


def _compare(
    sparse: Kept,
    dense: Kept,
    plan: SelectionPlan,
    device: torch.device,
    rounds: int,
    until: float,
    found: list[Row],
    batch_size: int,
) -> list[Row]:
    torch.manual_seed(0)
    text_BT = torch.randint(sparse.decoder.vocab_size, (batch_size, LENGTH), device=device)
    readers = {TWIN: EngineReader(dense.decoder, SelectionPlan(), LENGTH)}
    readers |= {way: EngineReader(sparse.decoder, plan, LENGTH, way=way) for way in WAYS}
    sides = {
        name: Side(reader.engine.decoder, partial(Decoding(reader, text_BT, PROMPT).turn, STEPS))
        for name, reader in readers.items()
    }
    compared = compare_sides(sides, device, rounds=rounds, until=until)
    rows = []
    for name, row in compared.items():
        new: Row = {"side": name} | row
        if "ms" in row:
            new["tokens/s"] = 1e3 * batch_size / row["ms"]
            step = partial(readers[name].step, text_BT[:, :1])
            readers[name].start(text_BT[:, :PROMPT])
            new["host waits"] = host_waits(step, device)
        rows.append(new)
    found += [{"sequences": batch_size} | row for row in rows]
    return rows


def _lowest(found: list[Row], share: float, models: Sequence[Kept]) -> list[Row]:
    """The lowest ratio of each way over all batch sizes; the models make room for the next ones."""
    for each in models:
        each.forget()
    rows = []
    for way in WAYS:
        ratios = {r["sequences"]: r["speed ratio"] for r in found if r["side"] == way and "ms" in r}
        ratios = {size: ratio for size, ratio in ratios.items() if ratio is not None}
        if ratios:
            at = min(ratios, key=lambda size: ratios[size])
            lowest = {"lowest ratio": ratios[at], "at": at, "measured sizes": len(ratios)}
            rows.append({"side": way, "active": share} | lowest)
    return rows

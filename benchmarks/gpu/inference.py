"""Decoding and reading by the sparse engine in bfloat16, for `python -m benchmarks.gpu`.

The twin, all experts and each plan alternate in the same engine, at the engine's own switch
points, with random weights on random text.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.gpu.engines import copy_bandwidth, host_waits
from benchmarks.gpu.record import Measurement, Row
from benchmarks.gpu.sides import (
    Models,
    Side,
    compare_sides,
    made_on,
    models_1b,
    models_100m,
    paper_models,
)
from benchmarks.speed.decoding import Decoding, Ours
from benchmarks.speed.sparse_models import active_bytes, hidden_share, operations
from benchmarks.timing import seconds_per_call
from lightning_dsmoe import Decoder, SelectionPlan, compile_sparse
from lightning_dsmoe.inference import SparseModel

TWIN, ALL = "dense twin", "all experts"
NOTES = (
    "bfloat16, random weights and text, medians of alternating rounds. Active: the share of the "
    "hidden parameters. The speed ratio is to the dense twin in the same round, above 1 where the "
    "side is faster; low and high are its quartiles; bound is that ratio by the bytes of weights "
    "(decoding one sequence) or the operations (reading) that both need. Decoding one sequence: "
    "bytes of active weights by the second, and their share of what a copy of 1 GiB within the "
    "card's memory reads and writes. Host waits: of 17 steps or one prompt. GB as 1e9 bytes."
)
PROMPT, STEPS, LENGTH = 64, 16, 128
"""Decoding: tokens that are read at once, steps of a turn, tokens after which a text restarts."""


class Turn(Protocol):
    """Makes what takes a turn of a model under a plan on a text, and gives its seconds."""

    def __call__(
        self, model: SparseModel, plan: SelectionPlan, text_BT: Tensor
    ) -> Callable[[], float]: ...


class Engines:
    """A model and its twin in the engine, made on a device when they are first needed.

    Args:
        models: the two models and the plans.
        device: where they run.
    """

    def __init__(self, models: Models, device: torch.device) -> None:
        nowhere = torch.device("meta")
        self._models, self._device = models, device
        self._sparse, self._dense = made_on(nowhere, models.sparse), made_on(nowhere, models.dense)
        self._everything = SelectionPlan()

    @cached_property
    def sparse(self) -> SparseModel:
        """The model with routers, which runs any plan."""
        return self._compiled(self._models.sparse)

    @cached_property
    def dense(self) -> SparseModel:
        """Its twin."""
        return self._compiled(self._models.dense)

    def _compiled(self, make: Callable[[], Decoder]) -> SparseModel:
        return compile_sparse(made_on(self._device, make).bfloat16(), self._everything)

    def compare(
        self,
        turn: Turn,
        shape: tuple[int, int],
        *,
        tokens: int,
        needs: Callable[[Decoder, SelectionPlan], float] | None,
        rounds: int,
        until: float,
    ) -> list[Row]:
        """Let the twin, all experts and each plan take turns on a text.

        Args:
            turn: what to do.
            shape: sequences, and tokens of each.
            tokens: tokens of a step.
            needs: bytes or operations of a step, if they say how long it takes at least.
            rounds: as in `compare_sides`.
            until: as in `compare_sides`.
        """
        torch.manual_seed(0)
        text_BT = torch.randint(self._dense.vocab_size, shape, device=self._device)
        plans = {ALL: self._everything, **self._models.plans}
        sides = {TWIN: Side(self.dense, turn(self.dense, self._everything, text_BT))}
        sides |= {n: Side(self.sparse, turn(self.sparse, p, text_BT)) for n, p in plans.items()}
        compared = compare_sides(sides, self._device, rounds=rounds, until=until)
        waits = {
            name: host_waits(side.turn, self._device)
            for name, side in sides.items()
            if "ms" in compared[name]
        }
        counted = {TWIN: (self._dense, self._everything)}
        counted |= {name: (self._sparse, plan) for name, plan in plans.items()}
        rows = []
        for name, row in compared.items():
            found: Row = {"side": name, "active": hidden_share(*counted[name])} | row
            if "ms" in row:
                found["tokens/s"] = 1e3 * tokens / row["ms"]
                found["bound"] = needs and needs(*counted[TWIN]) / needs(*counted[name])
                found["needs/s"] = needs and 1e3 * needs(*counted[name]) / row["ms"]
                found["host waits"] = waits[name]
            rows.append(found)
        return rows


def in_bfloat16(decoder: Decoder, plan: SelectionPlan) -> float:
    """Bytes of the weights that one token needs."""
    return active_bytes(decoder, plan, expert_bytes=2, other_bytes=2)


def measured_shapes() -> list[Models]:
    """The shapes that are measured, that of the aims first: compiling may take all of the time."""
    return [paper_models("6B"), models_1b(), models_100m()]


def decode(
    device: torch.device,
    until: float,
    *,
    shapes: Callable[[], Sequence[Models]] = measured_shapes,
    batch_sizes: Sequence[int] = (1, 4, 16, 64),
    rounds: int = 11,
    copy_bytes: int = 2**30,
) -> list[Measurement]:
    """One token more of each of some sequences."""

    def decoding(model: SparseModel, plan: SelectionPlan, text_BT: Tensor) -> Callable[[], float]:
        return partial(Decoding(Ours(model, plan, LENGTH), text_BT, PROMPT).turn, STEPS)

    engines = {models.name: Engines(models, device) for models in shapes()}
    copied: dict[str, float] = {}

    def copy() -> list[Row]:
        copied["bytes/s"] = copy_bandwidth(device, n_bytes=copy_bytes)
        return [{"side": "copy within memory", "GB/s": copied["bytes/s"] / 1e9}]

    def run(both: Engines, size: int) -> list[Row]:
        rows = both.compare(
            decoding,
            (size, LENGTH),
            tokens=size,
            needs=in_bfloat16 if size == 1 else None,  # more sequences share what they read
            rounds=rounds,
            until=until,
        )
        for row in rows:
            if read := row.pop("needs/s", None):
                row["GB/s"] = read / 1e9
                row["of copy"] = read / copied["bytes/s"] if copied else None
        return rows

    todo = [Measurement({"model": ""}, copy)]
    todo += [
        Measurement({"model": name, "sequences": size}, partial(run, both, size))
        for size in batch_sizes
        for name, both in engines.items()
    ]
    return todo


def prefill(
    device: torch.device,
    until: float,
    *,
    shapes: Callable[[], Sequence[Models]] = measured_shapes,
    batch_sizes: Sequence[int] = (1, 8),
    lengths: Sequence[int] = (512, 2048),
    rounds: int = 11,
) -> list[Measurement]:
    """Prompts read into new contexts."""

    def reading(model: SparseModel, plan: SelectionPlan, text_BT: Tensor) -> Callable[[], float]:
        def read() -> object:
            return model.engine.open(*text_BT.shape, plan).read(text_BT)

        return partial(seconds_per_call, read, 1)

    engines = {models.name: Engines(models, device) for models in shapes()}

    def run(both: Engines, size: int, length: int) -> list[Row]:
        rows = both.compare(
            reading,
            (size, length),
            tokens=size * length,
            needs=lambda *model: size * operations(*model, length),
            rounds=rounds,
            until=until,
        )
        for row in rows:
            if done := row.pop("needs/s", None):
                row["TFLOP/s"] = done / 1e12
        return rows

    return [
        Measurement(
            {"model": name, "prompts": size, "tokens of each": length},
            partial(run, both, size, length),
        )
        for size in batch_sizes
        for length in lengths
        for name, both in engines.items()
    ]

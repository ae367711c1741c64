"""Models that `python -m benchmarks.gpu` compares, and comparing them on a device."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

from benchmarks.gpu.record import Row, in_one_line, tidy_up
from benchmarks.speed import sparse_models
from benchmarks.timing import compare, rounds_of
from lightning_dsmoe import Decoder, SelectionPlan, TopK
from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.experts import FeedForward

PAPER = Path(__file__).parents[2] / "cli_configs" / "paper"
VOCABULARY = 50304
"""Of the paper's shapes, of which it tells none: GPT-2's, rounded up for a GPU's products."""
PAPER_PLANS = {
    "1B": {"paper, 41 %": SelectionPlan(experts=TopK(9), attention=TopK(12))},
    "3B": {"paper, K = 6": SelectionPlan(experts=TopK(6))},
    "6B": {
        "paper, K = 4": SelectionPlan(experts=TopK(4)),
        "paper, 29 %": SelectionPlan(experts=TopK(4), attention=TopK(6)),
    },
}
"""The shares that the paper's models run, and the numbers of experts of its throughput tests."""


class Models(NamedTuple):
    """A shape.

    Args:
        name: what tables call it.
        sparse: makes the model with routers.
        dense: makes the same widths without.
        plans: plans of fixed numbers.
    """

    name: str
    sparse: Callable[[], Decoder]
    dense: Callable[[], Decoder]
    plans: Mapping[str, SelectionPlan]


class Side(NamedTuple):
    """One side of a comparison.

    Args:
        model: the model, whose weights count as memory.
        turn: takes a turn and gives its seconds per step.
    """

    model: nn.Module
    turn: Callable[[], float]


def models_100m() -> Models:
    """The 100 M parameters of `decode.py` and `prefill.py`."""
    return Models("100M", sparse_models.ds_moe, sparse_models.dense_twin, sparse_models.PLANS)


def models_1b() -> Models:
    """The paper's 1B shape: the shares of P1 to P3, and those that its model runs on average."""
    plans = {
        "P1": SelectionPlan(experts=TopK(11)),
        "P2": SelectionPlan(experts=TopK(9), attention=TopK(8)),
        "P3": SelectionPlan(experts=TopK(3), attention=TopK(4)),
        "paper": SelectionPlan(experts=TopK(9), attention=TopK(12)),
    }
    return paper_models("1B")._replace(plans=plans)


def paper_models(name: str) -> Models:
    """A shape of the paper, 1B, 3B or 6B, under the shares that it tells of."""
    path = PAPER / f"dsmoe_{name.lower()}.yaml"
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]
    width, layers = model["d_model"], model["n_layers"]
    attention, feed_forward = _factory(model["attention"]), _factory(model["feed_forward"])
    heads, experts = attention.keywords, feed_forward.keywords
    twins_attention = partial(
        GroupedQueryAttention,
        n_heads=heads["n_experts"] * heads["n_heads"],
        n_kv_heads=heads["n_heads"],
        d_head=heads["d_head"],
    )
    twins_feed_forward = partial(FeedForward, d_hidden=experts["n_experts"] * experts["d_expert"])

    def make(attention: partial[Any], feed_forward: partial[Any]) -> Decoder:
        torch.manual_seed(0)
        return Decoder(VOCABULARY, width, layers, attention=attention, feed_forward=feed_forward)

    return Models(
        name,
        partial(make, attention, feed_forward),
        partial(make, twins_attention, twins_feed_forward),
        PAPER_PLANS[name],
    )


def _factory(config: dict[str, Any]) -> "partial[Any]":
    """What a `class_path` with `init_args` makes, without the command line's packages."""
    module, _, name = config["class_path"].rpartition(".")
    options = {
        key: _factory(value) if isinstance(value, dict) else value
        for key, value in config.get("init_args", {}).items()
    }
    return partial(getattr(import_module(module), name), **options)


def made_on(device: torch.device, make: Callable[[], Decoder]) -> Decoder:
    """Make a model where it is to run, so that random weights take no time."""
    with device:
        return make()


def compare_sides(
    sides: Mapping[str, Side], device: torch.device, *, rounds: int, until: float
) -> dict[str, Row]:
    """Let sides take turns; all are compared with the first.

    A side whose first turn fails is left out; what it said is its row.

    Args:
        sides: the sides.
        device: where they run.
        rounds: rounds that count.
        until: time by `time.monotonic()` after which no round begins, but for the first.

    Returns:
        Of each side its milliseconds per step, how many times as fast as the first one it is with
        the quartiles over rounds, and the memory that it needs, with its weights.
    """
    rows: dict[str, Row] = {}
    needed: dict[str, float | None] = {}
    for name, side in sides.items():
        try:
            needed[name] = peak_gigabytes(side, device)
        except Exception as error:  # of one side: the others are still worth comparing
            rows[name] = {"error": in_one_line(error)}
        tidy_up()
    running = {name: sides[name].turn for name in needed}
    seconds: dict[str, list[float]] = {}
    try:
        if running:
            seconds = rounds_of(running, rounds=rounds, until=until)
    except Exception as error:  # such as memory that fits what one side keeps, but not all
        rows |= {name: {"error": in_one_line(error)} for name in running}
    reference = seconds.get(next(iter(sides)))
    for name, taken in seconds.items():
        found = None if reference is None else compare(taken, reference)
        rows[name] = {
            "ms": 1e3 * median(taken),
            "speed ratio": None if found is None else found.ratio,
            "low": None if found is None else found.spread[0],
            "high": None if found is None else found.spread[1],
            "rounds": len(taken),
            "peak GB": needed[name],
        }
    return {name: rows[name] for name in sides}


def peak_gigabytes(side: Side, device: torch.device) -> float | None:
    """Memory that one turn needs, weights and what they are trained with included."""
    if device.type != "cuda":
        side.turn()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    side.turn()
    more = torch.cuda.max_memory_allocated(device) - before
    weights = {id(t): t.nbytes for t in (*side.model.parameters(), *side.model.buffers())}
    return (sum(weights.values()) + more) / 1e9

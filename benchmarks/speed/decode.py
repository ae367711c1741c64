"""Decoding by the sparse engine: against memory, against the dense twin, at every batch size.

    python -m benchmarks.speed.decode --json decode.json --figure decode.png
    python -m benchmarks.speed.decode --batch-sizes 1 8 --rounds 5  # some of it

All sides of a comparison alternate in this process; ratios are medians over rounds of the ratio
within a round, above 1 where the sparse side is faster. The model has 100 M parameters in float32,
random weights and random text; the plans are P1 (49 % of the hidden parameters for a token), P2
(34 %) and P3 (15 %), the twin has the same widths without routers and runs in the same engine.

* One text: bytes of the weights that a plan needs, by the second, over the rate at which the sum of
  256 MB is read; speed over the twin, and over the bound, the ratio of the bytes that both need.
* Batch sizes: speed over the twin for one token more of each of 1 to 4096 sequences.
* Active share: tokens per second under plans of 10 to 100 %.
* Experts: 256 experts of 16 hidden units against 32 of 128. The larger router is made up for by
  fewer experts, so that both sides need about the same bytes.
* Start: from the start of a new process to the first tokens of a saved model, kernels at hand.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.speed.decode_report import figure, table
from benchmarks.speed.decoding import Decoding, Ours
from benchmarks.speed.sparse_models import (
    PLANS,
    VOCABULARY,
    active_bytes,
    dense_twin,
    ds_moe,
    hidden_share,
)
from benchmarks.timing import compare, machine, rounds_of
from lightning_dsmoe import SelectionPlan, TopK, compile_sparse
from lightning_dsmoe.inference import SparseModel

BATCH_SIZES = [2**n for n in range(13)]
SHARES = [(2, 1), (3, 2), (6, 3), (9, 4), (14, 5), (20, 6), (26, 7), (32, 8)]
STREAM_BYTES = 256 * 2**20
DENSE = SelectionPlan()


def main() -> None:
    """Measure what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch; its default if left out")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of each comparison")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=BATCH_SIZES)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--figure", type=Path, help="also draw them here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds = options.rounds
    results: dict[str, Any] = {"machine": machine(), "batch_sizes": {}}
    results["one_text"] = one_text(rounds=rounds)
    results["experts"] = many_experts(rounds=rounds)
    results["shares"] = shares(rounds=max(3, rounds // 2))
    for size in options.batch_sizes:
        fewer = max(3, rounds // max(1, size // 64))
        results["batch_sizes"][size] = batch_size(size, rounds=fewer)
    results["start"] = start()
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.figure:
        figure(results, options.figure)


@cache
def sparse(quantization: Any = None) -> SparseModel:
    """The model, which runs any plan."""
    return compile_sparse(ds_moe(), DENSE, quantization=quantization)


@cache
def twin() -> SparseModel:
    """The dense twin."""
    return compile_sparse(dense_twin(), DENSE)


def side(model: SparseModel, plan: SelectionPlan, size: int = 1) -> Callable[[], float]:
    """Decode a few tokens of each of some random sequences; gives seconds per step."""
    prompt, steps, length = (64, 16, 128) if size <= 64 else (2, 1, 8)
    torch.manual_seed(0)
    text_BT = torch.randint(VOCABULARY, (size, length))
    return partial(Decoding(Ours(model, plan, length), text_BT, prompt).turn, steps)


def one_text(*, rounds: int) -> dict[str, Any]:
    """Compare plans with the speed of memory and with the twin, in float32 and 8 bits."""
    buffer = torch.ones(STREAM_BYTES // 4)

    def stream() -> float:
        begin = time.perf_counter()
        buffer.sum()
        return time.perf_counter() - begin

    sides = {"stream": stream, "twin": side(twin(), DENSE)}
    n_bytes = {"stream": STREAM_BYTES, "twin": active_bytes(dense_twin(), DENSE)}
    for name, plan in PLANS.items():
        sides[name] = side(sparse(), plan)
        sides[f"{name}, int8"] = side(sparse("int8"), plan)
        n_bytes[name] = active_bytes(ds_moe(), plan)
        n_bytes[f"{name}, int8"] = active_bytes(ds_moe(), plan, expert_bytes=1)
    seconds = rounds_of(sides, rounds=rounds)
    found = {}
    for name in sides:
        over_stream = compare(seconds[name], seconds["stream"]).ratio * n_bytes[name] / STREAM_BYTES
        over_twin = compare(seconds[name], seconds["twin"])
        bound = n_bytes["twin"] / n_bytes[name]
        found[name] = {
            "milliseconds": 1e3 * median(seconds[name]),
            "megabytes": n_bytes[name] / 1e6,
            "over_stream": over_stream,
            "over_twin": over_twin.ratio,
            "spread": over_twin.spread,
            "bound": bound,
            "over_bound": over_twin.ratio / bound,
            "over_float32": compare(seconds[name], seconds[name.split(",")[0]]).ratio,
        }
    return found


def batch_size(size: int, *, rounds: int) -> dict[str, Any]:
    """Compare plans with the twin at one batch size."""
    sides = {name: side(sparse(), plan, size) for name, plan in PLANS.items()}
    seconds = rounds_of({"twin": side(twin(), DENSE, size), **sides}, rounds=rounds)
    return {
        name: compare(taken, seconds["twin"])._asdict()
        | {"tokens_per_second": size / median(taken)}
        for name, taken in seconds.items()
    }


def shares(*, rounds: int) -> list[dict[str, float]]:
    """Tokens per second of one sequence by the share of hidden parameters that run."""
    decoder = ds_moe()
    plans = [plan_of(*numbers) for numbers in SHARES]
    sides = {str(n): side(sparse(), plan) for n, plan in enumerate(plans)}
    seconds = rounds_of({"twin": side(twin(), DENSE), **sides}, rounds=rounds)
    return [
        {
            "share": hidden_share(decoder, plan),
            "tokens_per_second": 1 / median(seconds[str(n)]),
            "over_twin": compare(seconds[str(n)], seconds["twin"]).ratio,
        }
        for n, plan in enumerate(plans)
    ]


def plan_of(experts: int, attention: int) -> SelectionPlan:
    """A plan of fixed numbers."""
    return SelectionPlan(experts=TopK(experts), attention=TopK(attention))


def many_experts(*, rounds: int) -> dict[str, Any]:
    """Time with 256 small experts over that with 32."""
    small = ds_moe(n_experts=256, d_expert=16)
    model = compile_sparse(small, DENSE)
    found = {}
    for few, many in ((3, 17), (11, 81)):
        plans = plan_of(few, 2), plan_of(many, 2)
        sides = {"32": side(sparse(), plans[0]), "256": side(model, plans[1])}
        seconds = rounds_of(sides, rounds=rounds)
        n_bytes = active_bytes(ds_moe(), plans[0]), active_bytes(small, plans[1])
        found[f"{few} of 32 and {many} of 256"] = {
            "bytes": n_bytes[1] / n_bytes[0],
            **compare(seconds["32"], seconds["256"])._asdict(),
        }
    return found


FIRST = """
import time, sys, torch
from lightning_dsmoe import load_sparse
model = load_sparse(sys.argv[1])
prompt = torch.zeros(1, 16, dtype=torch.long)
model.generate(prompt, 1, temperature=0)
print(time.time(), flush=True)
model.warm_up()
model.generate(prompt, 2, temperature=0)
print(time.time(), flush=True)
"""


def start() -> dict[str, float]:
    """Seconds from the start of a process to its first token, and to the first compiled step."""
    with tempfile.TemporaryDirectory() as folder:
        model = compile_sparse(ds_moe(), PLANS["P2"])
        model.save(f"{folder}/model")
        model.warm_up()  # so that the kernels are at hand
        found = []
        for _ in range(3):
            begin = time.time()
            command = [sys.executable, "-c", FIRST, f"{folder}/model"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append([float(at) - begin for at in done.stdout.split()])
    first, second = zip(*found, strict=True)
    return {"first_token": median(first), "second_token": median(second)}


if __name__ == "__main__":
    main()

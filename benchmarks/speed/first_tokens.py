"""The first tokens of a plan that is new to a machine, while another process compiles.

    python -m benchmarks.speed.first_tokens
    python -m benchmarks.speed.first_tokens --all_threads

One sequence of random text is decoded with an empty cache of kernels: uncompiled first, and with
the compiled step from the token on for which it is ready. Meanwhile decoding leaves a core to the
compiler; with `--all_threads` it does not. Both have to run on a machine with nothing else to do,
one after the other: what is measured is the competition for its cores.

Shapes: B sequences, T tokens.
"""

import argparse
import os
import tempfile
import time
from contextlib import nullcontext
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.sparse_models import PLANS, VOCABULARY, ds_moe
from benchmarks.timing import machine, seconds_per_call
from lightning_dsmoe import SelectionPlan, compile_sparse
from lightning_dsmoe.inference.engine import engine as engine_module
from lightning_dsmoe.inference.engine.engine import Engine, EngineReader

PROMPT, LENGTH = 16, 4000
AFTER = 60  # compiled tokens that are timed


class FirstTokens(NamedTuple):
    """Seconds of tokens, and from the first of them to the compiled step."""

    alone: list[float]
    meanwhile: list[float]
    ready_after: float
    compiled: list[float]


def main() -> None:
    """Measure, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch; its default if left out")
    parser.add_argument("--plan", choices=PLANS, default="P1")
    parser.add_argument("--all_threads", action="store_true", help="leave no core to the compiler")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.all_threads:
        engine_module.leave_a_core = nullcontext
    plan = PLANS[options.plan]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        found = measured(compile_sparse(ds_moe(), plan).engine, plan)
    print(line(found))


@torch.inference_mode()
def measured(engine: Engine, plan: SelectionPlan) -> FirstTokens:
    """Decode until the compiled step has given some tokens."""
    torch.manual_seed(0)
    text_1T = torch.randint(VOCABULARY, (1, LENGTH))

    def started() -> tuple[EngineReader, list[Tensor]]:
        reader = engine.open(1, LENGTH, plan)
        reader.read(text_1T[:, :PROMPT])
        return reader, list(text_1T[:, PROMPT:].split(1, 1))

    cache_only, tokens = started()
    [cache] = cache_only._caches
    alone = [
        seconds_per_call(lambda t=t: engine.forward(t, plan, cache=cache, only_last=True), 1)
        for t in tokens[:AFTER]
    ]
    reader, tokens = started()
    meanwhile, compiled, ready_after = list[float](), list[float](), 0.0
    start = time.perf_counter()
    for token in tokens:
        taken = seconds_per_call(lambda t=token: reader.read(t), 1)
        if not engine._steps:
            meanwhile.append(taken)
            continue
        ready_after = ready_after or time.perf_counter() - start
        compiled.append(taken)
        if len(compiled) > AFTER:
            break
    if not all(engine._steps.values()) or len(compiled) < 2:
        raise RuntimeError(f"there is no compiled step after {len(meanwhile)} tokens")
    return FirstTokens(alone, meanwhile, ready_after, compiled[1:])  # the first one loads kernels


def line(found: FirstTokens) -> str:
    """Markdown."""
    on = machine()
    cells = [
        str(len(found.meanwhile)),
        *(f"{1e3 * median(each):.1f}" for each in (found.meanwhile, found.alone)),
        f"{found.ready_after:.0f} s",
        f"{1e3 * median(found.compiled):.1f}",
    ]
    return "\n".join(
        [
            f"{on['cpu']}, {on['threads']} threads, torch {on['torch']}, {on['date']}",
            "",
            "| tokens before the step was ready | ms a token meanwhile | alone | ready after "
            "| compiled, ms a token |",
            "|---|---|---|---|---|",
            f"| {' | '.join(cells)} |",
        ]
    )


if __name__ == "__main__":
    main()

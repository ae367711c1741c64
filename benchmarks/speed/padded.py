"""Decoding some sequences with a compiled step for more: what the rows left over cost.

    python -m benchmarks.speed.padded --threads 1

Steps are compiled for 1, 2, 4, 8 and 16 sequences. A batch of another size takes the next larger
one, from 9 to 15 sequences one of 8 and another one. Both ways take turns in this process with a
step of exactly so many sequences; ratios are medians over rounds of the ratio within a round, above
1 where the exact step is faster. Nine steps are compiled first, minutes each where they are new.

Shapes: B sequences, T tokens.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.decoding import Decoding
from benchmarks.speed.sparse_models import PLANS, ds_moe
from benchmarks.timing import Comparison, compare, machine, rounds_of
from lightning_dsmoe import SelectionPlan, compile_sparse
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode.compiled_step import CompiledStep
from lightning_dsmoe.inference.engine.decode.kernel_source import KernelSource
from lightning_dsmoe.inference.engine.engine import Engine

FILLED_UP = (3, 4), (5, 8), (6, 8), (9, 16), (12, 16)
IN_TWO = (9, (8, 1)), (12, (8, 4))
PROMPT, LENGTH, STEPS = 32, 256, 2


class Filled:
    """Reads sequences with one step, filled up with the last of them.

    Args:
        engine: the engine.
        plan: the experts that run.
        step: the step, for as many sequences or more.
    """

    def __init__(self, engine: Engine, plan: SelectionPlan, step: CompiledStep) -> None:
        self._engine, self._plan, self._step = engine, plan, step

    def start(self, prompt_BT: Tensor) -> None:
        """Forget everything and read prompts."""
        self._cache = DecoderCache(self._engine.decoder, len(prompt_BT), LENGTH)
        self._engine.forward(prompt_BT, self._plan, cache=self._cache, only_last=True)
        self._cache.pad_to(self._step.n_sequences)

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Read one token more of each sequence."""
        return self._step(tokens_B1[self._cache.sequence_of_row, 0], self._cache)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch; its default if left out")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of all sides")
    parser.add_argument("--plan", choices=PLANS, default="P1")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = PLANS[options.plan]
    print(table(measured(compile_sparse(ds_moe(), plan).engine, plan, rounds=options.rounds)))


def measured(engine: Engine, plan: SelectionPlan, *, rounds: int) -> dict[str, Comparison]:
    """Compare the ways of decoding some numbers of sequences."""
    counts = {n for pair in FILLED_UP for n in pair} | {n for _, two in IN_TWO for n in two}
    source = KernelSource()
    steps = {
        n: CompiledStep(engine.layout(n), plan, n, get_kernels=partial(source.get, n, True))
        for n in sorted(counts)
    }

    def side(n: int, size: int) -> Callable[[], float]:
        torch.manual_seed(0)
        text_BT = torch.randint(engine.decoder.vocab_size, (n, LENGTH))
        return partial(Decoding(Filled(engine, plan, steps[size]), text_BT, PROMPT).turn, STEPS)

    sides = {(n, n): side(n, n) for n in sorted(counts)} | {way: side(*way) for way in FILLED_UP}
    seconds = rounds_of({str(way): turn for way, turn in sides.items()}, rounds=rounds)
    exact = {n: seconds[str((n, n))] for n in counts}
    found = {f"{n} by {size}": compare(exact[n], seconds[str((n, size))]) for n, size in FILLED_UP}
    for n, two in IN_TWO:
        sums = [sum(each) for each in zip(*(exact[size] for size in two), strict=True)]
        found[f"{n} by {two[0]} and {two[1]}"] = compare(exact[n], sums)
    return found


def table(found: dict[str, Comparison]) -> str:
    """Markdown."""
    on = machine()
    lines = [
        f"{on['cpu']}, {on['threads']} threads, torch {on['torch']}, {on['date']}",
        "",
        "| sequences | exact step, ms | ms | over exact | quartiles |",
        "|---|---|---|---|---|",
    ]
    for name, each in found.items():
        low, high = each.spread
        lines.append(
            f"| {name} | {1e3 * each.candidate:.1f} | {1e3 * each.reference:.1f} "
            f"| {each.ratio:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

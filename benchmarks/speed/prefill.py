"""Reading a prompt with the sparse engine, against the dense twin.

    python -m benchmarks.speed.prefill --json prefill.json

The twin and the plans P1, P2 and P3 (49 %, 34 % and 15 % of the hidden parameters for a token) read
the same prompt in this process, alternating; ratios are medians over rounds of the ratio within a
round, above 1 where the sparse side is faster. The bound is the ratio of the floating-point
operations that both need: two for each weight that runs for a token, those of causal attention for
the heads that run, and the head on the last token.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.sparse_models import PLANS, VOCABULARY, dense_twin, ds_moe, operations
from benchmarks.timing import compare, machine, rounds_of, seconds_per_call
from lightning_dsmoe import SelectionPlan, compile_sparse
from lightning_dsmoe.inference import SparseModel

DENSE = SelectionPlan()


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch; its default if left out")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each comparison")
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 2048])
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sparse, dense = compile_sparse(ds_moe(), DENSE), compile_sparse(dense_twin(), DENSE)
    results: dict[str, Any] = {"machine": machine(), "prefill": []}
    for length in options.lengths:
        torch.manual_seed(0)
        tokens = torch.randint(VOCABULARY, (1, length))
        sides = {name: reading(sparse, plan, tokens) for name, plan in PLANS.items()}
        seconds = rounds_of({"twin": reading(dense, DENSE, tokens), **sides}, rounds=options.rounds)
        needed = operations(dense_twin(), DENSE, length)
        for name, plan in PLANS.items():
            compared = compare(seconds[name], seconds["twin"])
            bound = needed / operations(ds_moe(), plan, length)
            results["prefill"].append(
                {"plan": name, "length": length, "bound": bound, **compared._asdict()}
            )
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def reading(
    model: SparseModel, plan: SelectionPlan, tokens_BT: torch.Tensor
) -> Callable[[], float]:
    """Read a prompt into a new context; gives the seconds."""

    def read() -> object:
        return model.engine.open(*tokens_BT.shape, plan).read(tokens_BT)

    return partial(seconds_per_call, read, 1)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    on = results["machine"]
    lines = [
        f"{on['cpu']}, {on['threads']} threads, torch {on['torch']}, {on['date']}",
        "",
        "| tokens | plan | twin, ms | ms | over twin | quartiles | bound | of bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["prefill"]:
        low, high = row["spread"]
        lines.append(
            f"| {row['length']} | {row['plan']} | {1e3 * row['reference']:.0f} "
            f"| {1e3 * row['candidate']:.0f} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} "
            f"| {row['bound']:.2f} | {row['ratio'] / row['bound']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Feed-forward layers in a model of one's own: compiled, against the same layers run eagerly.

    python -m benchmarks.speed.foreign --json foreign.json

A plain stack of 12 residual feed-forward layers of width 768, each 32 experts of 128 hidden units,
with random weights, under top 3. Four sides take turns in this process: the trained layers with all
experts, the same under `run_plan`, and what `compile_sparse` makes of the stack in float32 and in 8
bits. Ratios are medians over rounds of the ratio within a round; above 1, the compiled stack is
faster. With several tokens none may be slower than all experts (ratio at least 0.97).
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.timing import compare, machine, rounds_of, seconds_per_call
from lightning_dsmoe import MixtureOfExperts, SelectionPlan, TopK, compile_sparse, run_plan
from lightning_dsmoe.inference import SparseModule

WIDTH, LAYERS, N_EXPERTS, D_EXPERT = 768, 12, 32, 128
PLAN = SelectionPlan(experts=TopK(3))


class Stack(nn.Module):
    """Residual feed-forward layers with a norm before each."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(LAYERS))
        self.layers = nn.ModuleList(
            MixtureOfExperts(WIDTH, N_EXPERTS, D_EXPERT) for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens `[N, D]`."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x)).output
        return x


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch; its default if left out")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of each comparison")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64, 512])
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    stack = Stack().eval().requires_grad_(False)
    sides: dict[str, Callable[[Tensor], Any]] = {
        "all experts": stack,
        "eager": partial(run_eagerly, stack),
        "compiled": compile_sparse(stack, PLAN),
        "int8": compile_sparse(stack, PLAN, quantization="int8"),
    }
    capability = torch.backends.cpu.get_cpu_capability()
    results: dict[str, Any] = {"machine": machine() | {"capability": capability}, "tokens": {}}
    for n_tokens in options.tokens:
        rounds = max(5, options.rounds // max(1, n_tokens // 64))
        results["tokens"][n_tokens] = measured(sides, n_tokens, rounds=rounds)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def run_eagerly(stack: Stack, x: Tensor) -> Tensor:
    """The trained layers under the plan."""
    with run_plan(stack, PLAN):
        y: Tensor = stack(x)
    return y


@torch.no_grad()
def measured(
    sides: dict[str, Callable[[Tensor], Any]], n_tokens: int, *, rounds: int
) -> dict[str, Any]:
    """Compare all sides on some tokens."""
    x = torch.randn(n_tokens, WIDTH)
    for name in ("compiled", "int8"):
        cast(SparseModule, sides[name]).warm_up(x)
    turns = {name: partial(seconds_per_call, partial(side, x), 4) for name, side in sides.items()}
    seconds = rounds_of(turns, rounds=rounds)
    return {
        name: {
            "over_all": compare(taken, seconds["all experts"])._asdict(),
            "over_eager": compare(taken, seconds["eager"])._asdict(),
        }
        for name, taken in seconds.items()
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    on = results["machine"]
    lines = [
        f"{on['cpu']} ({on['capability']}), {on['threads']} threads, torch {on['torch']}, "
        f"{on['date']}",
        "",
        "| tokens | side | ms | over eager under the plan | quartiles | over all experts "
        "| quartiles |",
        "|---|---|---|---|---|---|---|",
    ]
    for n_tokens, sides in results["tokens"].items():
        for name, row in sides.items():
            cells = []
            for ratio in (row["over_eager"], row["over_all"]):
                low, high = ratio["spread"]
                cells += [f"{ratio['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
            milliseconds = 1e3 * row["over_all"]["candidate"]
            lines.append(f"| {n_tokens} | {name} | {milliseconds:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

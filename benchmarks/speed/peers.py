"""Decoding by this library against Hugging Face transformers, models of the same shapes.

    pip install -e '.[hf]'
    python -m benchmarks.speed.peers --threads 1 --json peers.json
    python -m benchmarks.speed.peers --tiny --rounds 2  # every path, in a minute or two

All sides of a comparison alternate in this process: one token more of each sequence, after
prompts of 64 tokens, in float32 on the CPU, with random weights. Ratios of speed are medians over
rounds of the ratio within a round; above 1, this library is faster. Each step takes the most
probable token but then reads the next one of a random text, the same for all sides: random models
soon repeat one token, whose experts would stay in the processor's cache.

* Llama, dense, of the same total size as DS-MoE with 8 attention experts of 2 heads and 32 experts
  with GELU. P1 runs all attention experts and 11 others, P3 runs 2 and 3.
* Qwen3-MoE, with each implementation of its experts that transformers has, against the same
  experts and attention sizes, the attention split into experts that all run.
* JetMoE, 10 of 32 feed-forward and 10 of 32 attention experts on both sides.

Transformers' best path is the fastest one in the median. What does not run is in the table too.
"""

import argparse
import json
import logging
import textwrap
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.speed.decoding import Decoding, Ours, Reader
from benchmarks.speed.peer_models import (
    FULL,
    TINY,
    CompiledPeer,
    Peer,
    Size,
    ds_moe,
    glu_ds_moe,
    jet_ds_moe,
    jet_moe,
    llama,
    parameters,
    qwen3_moe,
)
from benchmarks.timing import compare, machine
from lightning_dsmoe import SelectionPlan, TopK
from lightning_dsmoe.inference import compile_sparse

PROMPT, CAPACITY = 64, 64 + 128
BATCH_SIZES = (1, 8)
STEPS = 8

Row = dict[str, Any]
T = TypeVar("T")


class Group(NamedTuple):
    """Models to compare: what makes each side, and parameters of each model."""

    ours: dict[str, Callable[[], Reader]]
    peers: dict[str, Callable[[], Reader]]
    parameters: dict[str, int]


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch; its default if left out")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each comparison")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64, as a trial")
    parser.add_argument("--peers", nargs="*", choices=("llama", "qwen3_moe", "jet_moe"))
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("error", message="decoding runs uncompiled")
    torch.compiler.config.recompile_limit = 16  # some paths compile anew for each of 12 layers
    torch.compiler.config.fail_on_recompile_limit_hit = True  # instead of going on uncompiled
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    size = TINY if options.tiny else FULL
    results: dict[str, Any] = {
        "machine": machine() | {"transformers": transformers.__version__},
        "parameters": {},
        "decoding": [],
    }
    groups = {"llama": llama_group, "qwen3_moe": qwen3_moe_group, "jet_moe": jet_moe_group}
    for name in options.peers or groups:
        group = groups[name](size)
        results["parameters"] |= group.parameters
        for batch_size in BATCH_SIZES:
            results["decoding"] += compare_group(
                group, size.vocabulary, batch_size=batch_size, rounds=options.rounds
            )
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def llama_group(size: Size) -> Group:
    """Llama against a model with experts of GELU, under two plans and in 8 bits."""
    decoder, peer = ds_moe(size), llama(size)
    p1 = SelectionPlan(experts=TopK(11))
    p3 = SelectionPlan(experts=TopK(3), attention=TopK(2))
    float32, int8 = compile_sparse(decoder, p1), compile_sparse(decoder, p1, quantization="int8")
    return Group(
        {
            "P1, float32": partial(Ours, float32, p1, CAPACITY),
            "P1, int8": partial(Ours, int8, p1, CAPACITY),
            "P3, int8": partial(Ours, int8, p3, CAPACITY),
        },
        _both_ways("Llama", lambda: peer),
        {"DS-MoE, GELU": parameters(decoder), "Llama": parameters(peer)},
    )


def qwen3_moe_group(size: Size) -> Group:
    """Qwen3-MoE, with each implementation of its experts, against a model of its shape."""
    decoder, plan = glu_ds_moe(size), SelectionPlan(experts=TopK(11))
    make = cache(partial(qwen3_moe, size, n_active=11))
    peers: dict[str, Callable[[], Reader]] = {}
    for experts in ("eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys())):
        peers |= _both_ways(f"Qwen3-MoE, {experts} experts", partial(make, experts))
    return Group(
        {"P1, SwiGLU, float32": partial(Ours, compile_sparse(decoder, plan), plan, CAPACITY)},
        peers,
        {"DS-MoE, SwiGLU": parameters(decoder), "Qwen3-MoE": parameters(make("eager"))},
    )


def jet_moe_group(size: Size) -> Group:
    """JetMoE against a model of its shape."""
    decoder, peer = jet_ds_moe(size), jet_moe(size, n_active=10)
    top_10 = TopK(10, renormalize=True)
    plan = SelectionPlan(experts=top_10, attention=top_10)
    return Group(
        {"top 10 of both, float32": partial(Ours, compile_sparse(decoder, plan), plan, CAPACITY)},
        _both_ways("JetMoE", lambda: peer),
        {"DS-MoE, 32 attention experts": parameters(decoder), "JetMoE": parameters(peer)},
    )


def _both_ways(name: str, make: Callable[[], PreTrainedModel]) -> dict[str, Callable[[], Reader]]:
    return {
        f"{name}, eager": lambda: Peer(make()),
        f"{name}, compiled": lambda: CompiledPeer(make(), CAPACITY),
    }


def take_turns(
    makers: dict[str, Callable[[], Reader]], text_BT: Tensor, *, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time all sides alternately, in another order each round, after one round that does not count.

    Returns:
        Seconds per step of each side, one entry a round, and of those that do not run the reason.
    """
    seconds: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:
            reasons[name] = _reason(error)
            seconds.pop(name, None)
            return None

    readers = {name: attempt(name, make) for name, make in makers.items()}
    sides = {name: Decoding(reader, text_BT, PROMPT) for name, reader in readers.items() if reader}
    for number in range(1 + rounds):
        names = [name for name in sides if name not in reasons]
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            taken = attempt(name, partial(sides[name].turn, STEPS))
            if taken is not None and number:
                seconds.setdefault(name, []).append(taken)
    return seconds, reasons


def _reason(error: BaseException) -> str:
    error = error.__cause__ or error
    words = " ".join(str(error).replace("|", "/").split())
    return textwrap.shorten(f"{type(error).__name__}: {words}", 160, placeholder=" ...")


def compare_group(group: Group, vocabulary: int, *, batch_size: int, rounds: int) -> list[Row]:
    """Compare each peer with each of our sides at one number of sequences."""
    torch.compiler.reset()
    torch.manual_seed(0)
    text_BT = torch.randint(vocabulary, (batch_size, CAPACITY))
    seconds, reasons = take_turns(group.ours | group.peers, text_BT, rounds=rounds)
    ours, peers = ([n for n in names if n in seconds] for names in (group.ours, group.peers))
    best = min(peers, key=lambda name: median(seconds[name]), default=None)
    rows: list[Row] = [
        {
            "batch_size": batch_size,
            "peer": peer,
            "best_path": peer == best,
            "ours": our,
            **compare(seconds[our], seconds[peer])._asdict(),
        }
        for peer in peers
        for our in ours
    ]
    rows += [{"batch_size": batch_size, "side": n, "reason": why} for n, why in reasons.items()]
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    on = results["machine"]
    lines = [
        f"{on['cpu']}, {on['threads']} threads, torch {on['torch']}, "
        f"transformers {on['transformers']}, {on['date']}",
        "",
        "| model | parameters |",
        "|---|---|",
        *(f"| {name} | {count:,} |" for name, count in results["parameters"].items()),
        "",
        "Bold: transformers' best path for the model and batch.",
        "",
        "| batch | transformers | ms | this library | ms | speed ratio | quartiles |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in results["decoding"]]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if "reason" in row:
        return f"| {row['batch_size']} | {row['side']} | does not run: {row['reason']} | | | | |"
    peer = f"**{row['peer']}**" if row["best_path"] else row["peer"]
    low, high = row["spread"]
    return (
        f"| {row['batch_size']} | {peer} | {1e3 * row['reference']:.1f} "
        f"| {row['ours']} | {1e3 * row['candidate']:.1f} "
        f"| {row['ratio']:.2f} | {low:.2f} to {high:.2f} |"
    )


if __name__ == "__main__":
    main()

"""Upcycling for real: dense Llamas become mixtures in a tenth of their training.

    python -m benchmarks.quality.upcycling --text tinyshakespeare.txt --json runs.json

For each size and seed trains a dense Llama of transformers. It is then trained a tenth longer as it
is, and, from the same weights, on the same windows and with the same schedule, as a mixture that
`upcycle` made of it with each split of its neurons. The last tenth of the text is held out: its
first half chooses the plan of a share, its second half, the test text, judges it.

Shares are of the hidden parameters, those of attention and routers included, which always run.
Runs in the JSON file are not repeated if their settings and the text are the same, and dense models
are kept in a folder as transformers does.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.quality.best_plans import best_plan
from benchmarks.quality.upcycled import (
    LEARNING_RATE,
    LIKENESS,
    MI_WEIGHT,
    SIZES,
    Split,
    cross_entropy,
    encoded,
    held_out,
    llama,
    mean_loss,
    train,
    upcycled,
    window_losses,
)
from benchmarks.timing import machine
from lightning_dsmoe.analysis import MeasuredBatches
from lightning_dsmoe.analysis.evaluation import evaluate
from lightning_dsmoe.analysis.plans.routing_statistics import routing_statistics
from lightning_dsmoe.files import sha256, write_text

DENSE, LONGER = "dense", "dense, a tenth longer"
SPLITS: tuple[Split, ...] = get_args(Split)
AIMS = {0.4: 0.005, 0.25: 0.015}
"""Shares of the hidden parameters, and how much the loss may be above that of the dense model."""

Run = dict[str, Any]


def main() -> None:
    """Carry out the runs that are missing, then print the table."""
    options = _options()
    runs = json.loads(options.json.read_text("utf-8")) if options.json.exists() else []
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported
    every: list[Run] = []
    for models in ((DENSE,), (LONGER, *options.splits)):  # the first is what the others start from
        wanted = [
            settings(model, size, seed=seed, text=options.text)
            for seed in dict.fromkeys(options.seeds)
            for size in options.sizes
            for model in models
        ]
        every += wanted
        missing = [each for each in wanted if find(each, runs) is None]
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            calls = [
                pool.submit(carry_out, each, options.text, options.checkpoints) for each in missing
            ]
            for future in as_completed(calls):
                runs.append(run := future.result())
                write_text(options.json, json.dumps(runs, indent=1) + "\n")
                name = "{size}, {model}, seed {seed}".format(**run["settings"])
                print(f"{name}: trained in {run['seconds']:.0f} s", file=sys.stderr)
    report = table([found for each in every if (found := find(each, runs)) is not None])
    print(report)
    if options.output:
        write_text(options.output, report + "\n")


def settings(model: str, size: str, *, seed: int, text: Path) -> Run:
    """What a run depends on, as plain data."""
    recipe: Run = SIZES[size]._asdict() | {"rates": LEARNING_RATE}
    if model in SPLITS:
        recipe |= {"top": list(SIZES[size].top), "mi": MI_WEIGHT, "likeness": LIKENESS}
    else:
        recipe = {name: recipe[name] for name in recipe if name not in ("n_experts", "top")}
    return {"model": model, "size": size, "seed": seed, "text": sha256(text), "recipe": recipe}


def find(wanted: Run, runs: Sequence[Run]) -> Run | None:
    """The run with these settings."""
    return next((run for run in runs if run["settings"] == wanted), None)


def carry_out(wanted: Run, path: Path, checkpoints: Path) -> Run:
    """Train one model, and measure it.

    Returns:
        The settings, the seconds of training, sizes, and the test loss: of all experts, and of the
        best plan of each share.
    """
    torch.set_num_threads(1)
    size, seed, text = SIZES[wanted["size"]], wanted["seed"], encoded(path)
    folder = checkpoints / f"dense_{wanted['size']}_{seed}"
    torch.manual_seed(seed)
    if wanted["model"] == DENSE:
        model = llama(size, int(text.max()) + 1)
    else:
        model = LlamaForCausalLM.from_pretrained(folder)
    begin = time.perf_counter()
    if wanted["model"] == DENSE:
        rate = LEARNING_RATE["dense"]
        train(model, text, size.steps, rate=rate, seed=seed, loss=cross_entropy)
        model.save_pretrained(folder)
    elif wanted["model"] == LONGER:
        rate = LEARNING_RATE["longer"]
        train(model, text, size.steps // 10, rate=rate, seed=1000 + seed, loss=cross_entropy)
    else:
        upcycled(model, text, size, seed=1000 + seed, split=wanted["model"])
    seconds = time.perf_counter() - begin
    return {
        "settings": wanted,
        "machine": machine(torch.device("cpu")),
        "seconds": seconds,
        "test": mean_loss(model, held_out(text, "test")),
        **(under_plans(model, text) if wanted["model"] in SPLITS else {}),
    }


def under_plans(model: LlamaForCausalLM, text: Tensor) -> Run:
    """Loss on the test text under the plan of each share that is best on the validation text."""
    batches = held_out(text, "validation")[::4]  # enough to choose one of two plans
    on = MeasuredBatches(model, batches, window_losses)
    test = MeasuredBatches(model, held_out(text, "test"), window_losses)
    statistics = routing_statistics(on)
    plans = {}
    for share in AIMS:
        if (best := best_plan(on, statistics, share)) is not None:
            result = evaluate(test, best.plan)
            plans[f"{share:g}"] = {
                "plan": best.words,
                "validation": best.found.loss,
                "test": result.loss,
                "share": result.active_share_mean,
            }
    sizes = {"hidden": statistics.hidden, "always": statistics.always / statistics.hidden}
    return {**sizes, "least": statistics.least_share, "plans": plans}


def table(runs: Sequence[Run]) -> str:
    """Markdown: for each size one line for each model, and how far from the aims it is."""
    return "\n\n".join(
        _table(size, [run for run in runs if run["settings"]["size"] == size])
        for size in dict.fromkeys(run["settings"]["size"] for run in runs)
    )


def _table(size: str, runs: Sequence[Run]) -> str:
    by_model: dict[str, dict[int, Run]] = {}
    for run in runs:
        by_model.setdefault(run["settings"]["model"], {})[run["settings"]["seed"]] = run
    anchor = {seed: run["test"] for seed, run in by_model.get(LONGER, {}).items()}
    lines = [
        f"| {size} | seeds | all | "
        + " | ".join(f"{share:.0%}: plans, share | loss" for share in AIMS)
        + " |",
        "|---" * (3 + 2 * len(AIMS)) + "|",
    ]
    for model, by_seed in by_model.items():
        everything = {seed: run["test"] for seed, run in by_seed.items()}
        cells = [model, str(len(by_seed)), _losses(everything, anchor)]
        for share in AIMS:
            found = {s: r.get("plans", {}).get(f"{share:g}") for s, r in by_seed.items()}
            points = {seed: point for seed, point in found.items() if point}
            if not points:
                cells += ["", ""]
                continue
            words = ", ".join(dict.fromkeys(point["plan"] for point in points.values()))
            cells.append(f"{words}: {mean(p['share'] for p in points.values()):.1%}")
            cells.append(_losses({s: p["test"] for s, p in points.items()}, anchor))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _verdict(by_model, anchor)])


def _losses(losses: dict[int, float], anchor: dict[int, float]) -> str:
    """Their mean, and how far they are from those of the dense model of the same seed."""
    above = [losses[seed] / anchor[seed] - 1 for seed in losses if seed in anchor]
    text = f"**{mean(losses.values()):.4f}**"
    if not above:
        return text
    return f"{text} {mean(above):+.2%} ({min(above):+.2%} to {max(above):+.2%})"


def _verdict(by_model: dict[str, dict[int, Run]], anchor: dict[int, float]) -> str:
    """Whether the aims are met, and whether the split by activations is worth its trouble."""
    sentences = []
    for share, aim in AIMS.items():
        by_split = {
            split: [
                run["plans"][f"{share:g}"]["test"] / anchor[seed] - 1
                for seed, run in by_model.get(split, {}).items()
                if seed in anchor and f"{share:g}" in run["plans"]
            ]
            for split in SPLITS
        }
        above = {split: mean(each) for split, each in by_split.items() if each}
        if not above:
            continue
        split = "activations" if "activations" in above else min(above, key=above.__getitem__)
        met = "met" if above[split] <= aim else "missed"
        sentence = f"{share:.0%}, {split}: {above[split]:+.2%}, aim {aim:+.1%}: {met}"
        if split != "contiguous" and "contiguous" in above:
            sentence += f"; {above[split] - above['contiguous']:+.2%} against contiguous"
        sentences.append(f"{sentence}.")
    return " ".join(sentences)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="nine tenths are trained on")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread")
    parser.add_argument("--json", type=Path, default=Path("upcycling.json"), help="keeps the runs")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("upcycling"), help="keeps the dense models"
    )
    parser.add_argument("--output", type=Path, help="also write the table here, as Markdown")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    return options


if __name__ == "__main__":
    main()

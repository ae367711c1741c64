"""The paper's claims at a small scale: DS-MoE, dense and sparsely trained models on the same text.

    python -m benchmarks.quality.reproduce --text tinyshakespeare.txt --output claims.md

Trains a dense model, a small one, three sparsely trained ones and DS-MoE under three weights of the
mutual-information loss, from `cli_configs/shakespeare_nano.yaml` and by the command line's own
code, and measures each on every token of the validation split under plans from sparse to dense.
Shares are of the hidden parameters: all but the embeddings and the head, routers and norms
included. `--preset large` has 4.4 M parameters, `--preset gpu` is nanoGPT's recipe of 10.7 M.

Each run has a process of its own. Runs in the JSON file are not repeated if all their settings and
the text are the same.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.quality.models import MODELS, OTHER_WAYS, PRESETS, configuration
from benchmarks.quality.report import figure, tables
from benchmarks.quality.runs import carry_out
from lightning_dsmoe.files import sha256, write_text

SHARES = [0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6]
"""Active shares that plans are made for, where a model can run so little."""
EPS = 0.48
"""Threshold under which running experts are counted, that of the paper's figure 5."""

Settings = dict[str, Any]
Result = dict[str, Any]


def main() -> None:
    """Carry out the runs that are missing, then judge the claims."""
    options = _options()
    every = [
        settings(model, options.preset, seed=seed, steps=options.steps, text=options.text)
        for seed in dict.fromkeys(options.seeds)
        for model in options.models
    ]
    results = json.loads(options.json.read_text("utf-8")) if options.json.exists() else []
    missing = [each for each in every if find(each, results) is None]
    calls = [
        (each, str(options.text), options.threads, checkpoint(options, each)) for each in missing
    ]
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read by torch when it is imported
    failed = 0
    for place, result in apart(carry_out, calls, processes=options.processes):
        run = f"{missing[place]['model']}, seed {missing[place]['seed']}"
        if isinstance(result, BaseException):
            failed += 1
            print(f"{run}: failed, {type(result).__name__}: {result}", file=sys.stderr)
        else:
            results.append(result)
            write_text(options.json, json.dumps(results, indent=1) + "\n")
            print(f"{run}: trained in {result['seconds']:.0f} s", file=sys.stderr)
    runs = by_model([found for each in every if (found := find(each, results)) is not None])
    if runs:
        report = tables(runs, SHARES)
        print(report)
        if options.output:
            write_text(options.output, report + "\n")
        if options.picture:
            figure(runs, SHARES, options.picture)
    if failed:
        sys.exit(f"{failed} of {len(missing)} runs failed; the same command tries them again")


def settings(model: str, preset: str, *, seed: int, steps: int | None, text: Path) -> Settings:
    """All that a run depends on, as plain data.

    Args:
        model: one of `MODELS` or `OTHER_WAYS`.
        preset: one of `PRESETS`.
        seed: of the weights and of the order of the text.
        steps: optimizer steps; None for those of the preset.
        text: the text.
    """
    chosen = PRESETS[preset]
    return {
        "model": model,
        "seed": seed,
        "text": sha256(text),
        "shares": SHARES,
        "eps": EPS,
        "configuration": configuration(model, chosen, seed=seed, steps=steps or chosen.steps),
    }


def find(wanted: Settings, results: Sequence[Result]) -> Result | None:
    """The result of a run with these settings."""
    return next((result for result in results if result["settings"] == wanted), None)


def checkpoint(options: argparse.Namespace, run: Settings) -> str | None:
    """Where to keep the trained model of a run, if it is to be kept."""
    if options.checkpoints is None:
        return None
    steps = run["configuration"]["trainer"]["max_steps"]
    name = f"{run['model']}, {options.preset}, {steps} steps, seed {run['seed']}"
    return str(options.checkpoints / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.ckpt")


def by_model(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """Results by model, in the order of `MODELS` and `OTHER_WAYS`, and seed."""
    runs: dict[str, dict[int, Result]] = {}
    for model in (*MODELS, *OTHER_WAYS):
        for result in results:
            if result["settings"]["model"] == model:
                runs.setdefault(model, {})[result["settings"]["seed"]] = result
    return runs


def apart(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, processes: int
) -> Iterator[tuple[int, Any]]:
    """Call a function in a new process for each tuple of arguments, some at a time.

    Yields:
        The place of a call in `calls`, and what it returned or raised, as calls end.
    """
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=1)
    try:
        futures = {pool.submit(function, *call): place for place, call in enumerate(calls)}
        for future in as_completed(futures):
            yield futures[future], future.exception() or future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="trained on but for its last tenth"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--models",
        nargs="+",
        choices=(*MODELS, *OTHER_WAYS),
        default=MODELS,
        metavar="NAME",
        help=f"by default {_quoted(MODELS)}; there are also {_quoted(OTHER_WAYS)}",
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--steps", type=int, help="optimizer steps; by default the preset's")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--json", type=Path, default=Path("reproduce.json"), help="keeps the runs")
    parser.add_argument("--checkpoints", type=Path, help="keep the trained models in this folder")
    parser.add_argument("--output", type=Path, help="also write the tables here, as Markdown")
    parser.add_argument("--picture", type=Path, help="draw the frontiers here, as .svg or .png")
    options = parser.parse_args()
    if not options.text.is_file():
        parser.error(f"--text: there is no file {options.text}")
    for name in ("steps", "processes", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.picture and options.picture.suffix not in (".svg", ".png"):
        parser.error(f"--picture must end in .svg or .png, got {options.picture}")
    return options


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


if __name__ == "__main__":
    main()

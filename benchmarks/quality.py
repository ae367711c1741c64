"""Quality on tinyshakespeare: the DS-MoE model, its dense twin and the sparsely trained baseline.

    python benchmarks/quality.py --text tinyshakespeare.txt --seeds 1 2 3 --json quality.json

Each is trained from `cli_configs/shakespeare_nano.yaml` (2,000 steps of 12 x 64 characters) and
evaluated on every token of the validation split, with all experts and under threshold and top-k
plans. Shares are of the hidden parameters: all but the embeddings and the head, routers and norms
included. Runs already in the JSON file are not repeated.
"""

import argparse
import json
import platform
import sys
import time
from collections import defaultdict
from datetime import date
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from lightning_dsmoe import SelectionPlan, Threshold, TopK
from lightning_dsmoe.callbacks import SparseEvaluation
from lightning_dsmoe.cli import cli_main
from lightning_dsmoe.files import write_text
from lightning_dsmoe.metrics import count_parameters

MODELS = {"dense twin": ["baselines/dense.yaml"], "DS-MoE": [], "SMoE": ["baselines/smoe.yaml"]}
PLANS = {
    "all experts": {},
    "threshold 0.1": {"experts": Threshold(0.1), "attention": Threshold(0.1)},
    "threshold 0.5": {"experts": Threshold(0.5), "attention": Threshold(0.5)},
    "threshold 1": {"experts": Threshold(1.0), "attention": Threshold(1.0)},
    "top-1, top-1": {"experts": TopK(1), "attention": TopK(1)},
    "top-2, top-1": {"experts": TopK(2), "attention": TopK(1)},
}


def main() -> None:
    """Train and evaluate what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="the text, split as nanoGPT does")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=Path("quality.json"))
    options = parser.parse_args()
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for seed in options.seeds:
        for model in MODELS:
            key = f"{model}, seed {seed}, {options.steps} steps"
            if key not in results:
                results[key] = train(model, options.text, seed, options.steps)
                write_text(options.json, json.dumps(results, indent=2) + "\n")
    print(table(results, options.steps))


def train(model: str, text: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one model and evaluate it under every plan that it can run."""
    configs = files("lightning_dsmoe").joinpath("cli_configs")
    arguments = ["fit"]
    for name in ("shakespeare_nano.yaml", *MODELS[model]):
        arguments += ["-c", str(configs.joinpath(name))]
    arguments += [
        f"--seed_everything={seed}",
        f"--data.init_args.seed={seed}",
        f"--data.init_args.files={text}",
        f"--trainer.max_steps={steps}",
        f"--model.init_args.lr_scheduler.init_args.max_steps={steps}",
        f"--model.init_args.lr_scheduler.init_args.warmup_steps={steps // 20}",
        f"--trainer.val_check_interval={steps}",
        "--trainer.callbacks=null",
        "--trainer.enable_checkpointing=false",
        "--trainer.logger=false",
        "--trainer.enable_model_summary=false",
    ]
    sys.argv[1:] = arguments
    start = time.perf_counter()
    cli = cli_main()
    seconds = time.perf_counter() - start
    decoder = cli.model.decoder
    plans = {} if model == "dense twin" else PLANS
    uniform = {
        name: SelectionPlan.uniform(decoder.n_layers, **plan) for name, plan in plans.items()
    }
    evaluation = SparseEvaluation(
        uniform or {"all experts": SelectionPlan.uniform(decoder.n_layers)}
    )
    cli.trainer.callbacks.append(evaluation)
    cli.datamodule.batch_size = 10 * cli.datamodule.batch_size
    [metrics] = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    counts = count_parameters(decoder)
    return {
        "parameters": counts.outside + counts.hidden,
        "hidden_parameters": counts.hidden,
        "seconds": seconds,
        "loss": metrics["val/loss"],
        "plans": {name: result._asdict() for name, result in evaluation.results.items()},
    }


def table(results: dict[str, Any], steps: int) -> str:
    """Markdown: losses as the mean over seeds, with the spread of the losses."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for key, result in results.items():
        model, _, run = key.partition(", seed ")
        if not run.endswith(f", {steps} steps"):
            continue
        for plan, values in result["plans"].items():
            reference = result["plans"]["all experts"]["loss"]
            rows[model, plan].append({**values, "gap": values["loss"] / reference - 1})
    lines = [
        f"{steps} steps, {torch.get_num_threads()} threads, {platform.processor() or 'CPU'}, "
        f"torch {torch.__version__}, {date.today()}",
        "",
        "| model | plan | seeds | loss | lowest to highest | to all experts | active share |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, plan), values in rows.items():
        losses = [value["loss"] for value in values]
        lines.append(
            f"| {model} | {plan} | {len(values)} | {mean(losses):.4f} "
            f"| {min(losses):.4f} to {max(losses):.4f} "
            f"| {mean(v['gap'] for v in values):+.2%} "
            f"| {mean(v['active_share'] for v in values):.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

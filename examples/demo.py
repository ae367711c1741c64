"""Train, evaluate, compile and sample a small DS-MoE model on the text that Python brings along.

Run by `make demo`; everything it makes is in `demo_output/`.
"""

import csv
import logging
import sys
import time
from importlib.resources import files
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lightning_dsmoe import SelectionPlan, load_sparse
from lightning_dsmoe.cli import cli_main
from lightning_dsmoe.commands import generate
from lightning_dsmoe.commands.console import console_output
from lightning_dsmoe.inference import SparseModel

OUTPUT = Path("demo_output")
PROMPT = "def __init__(self"


@console_output()
def main() -> None:
    """Run the whole demonstration."""
    console = Console()
    quickstart = str(files("lightning_dsmoe.cli_configs").joinpath("quickstart.yaml"))
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    console.rule("Training every expert")
    sys.argv[1:] = ["fit", "-c", quickstart, f"--trainer.logger.init_args.save_dir={OUTPUT}"]
    run = cli_main()
    folder = Path(run.trainer.log_dir)
    console.rule("Testing, with all experts and with those that matter")
    [metrics] = run.trainer.test(run.model, run.datamodule, verbose=False)
    loss_curve(folder / "metrics.csv", folder / "loss.png")

    console.rule("Result")
    model = load_sparse(folder / "sparse")
    dense = SelectionPlan.uniform(model.decoder.n_layers)
    batch = next(iter(run.datamodule.test_dataloader()))["input_ids"]
    table = Table("", "all experts", "sparse")
    table.add_row(
        "test loss, nats per byte",
        f"{metrics['test/loss']:.4f}",
        f"{metrics['test/sparse/threshold/loss']:.4f}",
    )
    table.add_row(
        "active share of hidden parameters",
        "100 %",
        f"{metrics['test/sparse/threshold/active_share']:.1%}",
    )
    rates = tokens_per_second(model, [dense, model.plan], batch)
    table.add_row("tokens/s, reading", *(f"{rate:,.0f}" for rate in rates))
    rates = tokens_per_second(model, [dense, model.plan], batch[:1, :1], new_tokens=64)
    table.add_row("tokens/s, writing one text", *(f"{rate:,.0f}" for rate in rates))
    console.print(table)
    console.rule("A sample of the sparse model")
    generate(artifact=str(folder / "sparse"), prompt=PROMPT, max_new_tokens=300, temperature=0.7)
    console.rule("Files")
    for path in (folder / "loss.png", folder / "utilization" / "last.png", folder / "sparse"):
        console.print(str(path))


def tokens_per_second(
    model: SparseModel, plans: list[SelectionPlan], tokens: torch.Tensor, new_tokens: int = 0
) -> list[float]:
    """Median speed under each plan, one after the other in each of several rounds."""

    def once(plan: SelectionPlan) -> float:
        start = time.perf_counter()
        if new_tokens:
            model.generate(tokens, new_tokens, plan=plan)
        else:
            model.logits(tokens, plan=plan)
        return (new_tokens or tokens.numel()) / (time.perf_counter() - start)

    rounds = torch.tensor([[once(plan) for plan in plans] for _ in range(7)])
    return rounds[1:].median(0).values.tolist()


def loss_curve(metrics: Path, picture: Path) -> None:
    """Draw the training and validation losses of a run's CSV log."""
    with metrics.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    curves = {
        "train/loss": "training, all experts",
        "val/loss": "validation, all experts",
        "val/sparse/threshold/loss": "validation, sparse",
    }
    for name, label in curves.items():
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        marker = "o" if name.startswith("val") else None
        style = "--" if "sparse" in name else "-"
        axes.plot(*zip(*points, strict=True), style, label=label, marker=marker, markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()

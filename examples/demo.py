"""Train, evaluate and compile a small DS-MoE model, and measure what its sparsity buys at 100 M.

Run by `make demo`; everything it makes is in `demo_output/`.
"""

import csv
import logging
import os
import sys
import time
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_dsmoe import (
    Decoder,
    FeedForward,
    GroupedQueryAttention,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    SparseModel,
    SwitchPoints,
    TopK,
    compile_sparse,
    load_sparse,
)
from lightning_dsmoe.cli import cli_main
from lightning_dsmoe.commands.console import console_output
from lightning_dsmoe.metrics import count_parameters

OUTPUT = Path("demo_output")
PROMPT = "def __init__(self"
VOCABULARY, WIDTH, LAYERS = 4096, 768, 12
EXPERTS, D_EXPERT = 32, 128
ATTENTION_EXPERTS, HEADS, D_HEAD = 8, 2, 64


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

    console.rule("Quality of the trained model")
    share = metrics["test/sparse/threshold/active_share"]
    loss, sparse_loss = metrics["test/loss"], metrics["test/sparse/threshold/loss"]
    table = Table("", "all experts", "sparse")
    table.add_row("active share of the hidden parameters", "100 %", f"{100 * share:.1f} %")
    table.add_row("test loss, nats per byte", f"{loss:.4g}", f"{sparse_loss:.4g}")
    table.add_row("", "", f"{100 * (sparse_loss / loss - 1):+.2f} %")
    console.print(table)

    console.rule("Text from the sparse model")
    model = load_sparse(folder / "sparse")
    model.switch_points = SwitchPoints(gather_up_to=0)  # too small a model to compile kernels for
    generator = torch.Generator().manual_seed(1234)
    text = model.generate(PROMPT, 300, temperature=0.7, generator=generator)
    console.print(text, markup=False, highlight=False)

    console.rule("Speed of as sparse a model of 100 M parameters")
    console.print(
        "The model above fits into the processor's cache, where reading fewer weights saves "
        "little. So this is the same architecture with random weights at a size that people run. "
        "Its decoding kernels are compiled first."
    )
    console.print(speed(share))
    console.rule("Files")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    pictures = folder / "loss.png", folder / "utilization" / "last.png"
    for path in (*pictures, checkpoint, folder / "sparse"):
        console.print(str(path))
    console.rule("What to try next")
    for command in (
        f'generate --artifact {folder / "sparse"} --prompt "def "',
        f"sweep --ckpt_path {checkpoint}",
        f"calibrate --ckpt_path {checkpoint} --budget 0.2",
        "fit -c cli_configs/quickstart.yaml --data.init_args.files 'my_texts/*.txt'",
    ):
        console.print(f"{script()} {command}", soft_wrap=True, markup=False, highlight=False)


def script() -> str:
    """The command of the environment that runs this, as one would type it from here."""
    path = Path(sys.executable).with_name("lightning-dsmoe")
    return os.path.relpath(path) if path.is_file() else "lightning-dsmoe"


def speed(share: float) -> Table:
    """Decoding speed of a dense model against its mixture with a share of the experts running."""
    k = max(1, round(share * EXPERTS))
    k_attention = max(1, round(share * ATTENTION_EXPERTS))
    plan = SelectionPlan(experts=TopK(k), attention=TopK(k_attention))
    mixture, twin = decoders()
    counts = count_parameters(mixture)
    left_out = sum(
        (layer.n_experts - (k if layer.n_experts == EXPERTS else k_attention)) * layer.per_expert
        for layer in counts.layers.values()
    )
    total_twin, total = (sum(p.numel() for p in model.parameters()) for model in (twin, mixture))
    dense = compile_sparse(twin, SelectionPlan())
    sparse = compile_sparse(mixture, plan)
    rates = tokens_per_second([dense, sparse])
    running = f"{k} of {EXPERTS} experts, {k_attention} of {ATTENTION_EXPERTS} attention experts"
    table = Table("", "dense twin", running)
    table.add_row("parameters, millions", f"{total_twin / 1e6:.3g}", f"{total / 1e6:.3g}")
    read = total - left_out
    table.add_row("read per token, millions", f"{total_twin / 1e6:.3g}", f"{read / 1e6:.3g}")
    table.add_row("decoding, tokens/s, one sequence", *(f"{rate:.3g}" for rate in rates))
    table.add_row("", "", f"{rates[1] / rates[0]:.2f} times as fast")
    return table


def decoders() -> tuple[Decoder, Decoder]:
    """A mixture of the quickstart's architecture and a dense model of the same widths."""
    make = partial(Decoder, VOCABULARY, WIDTH, LAYERS, norm=partial(nn.LayerNorm, bias=False))
    mixture = make(
        attention=partial(
            MixtureOfAttentionHeads, n_experts=ATTENTION_EXPERTS, n_heads=HEADS, d_head=D_HEAD
        ),
        feed_forward=partial(MixtureOfExperts, n_experts=EXPERTS, d_expert=D_EXPERT),
    )
    twin = make(
        attention=partial(
            GroupedQueryAttention,
            n_heads=ATTENTION_EXPERTS * HEADS,
            n_kv_heads=HEADS,
            d_head=D_HEAD,
        ),
        feed_forward=partial(FeedForward, d_hidden=EXPERTS * D_EXPERT),
    )
    return mixture, twin


def tokens_per_second(models: list[SparseModel], new_tokens: int = 48) -> list[float]:
    """Median decoding speed of each model, taking turns in each of several rounds."""
    start = torch.zeros(1, 1, dtype=torch.int64)

    def once(model: SparseModel) -> float:
        begin = time.perf_counter()
        # Sampled, as a random model soon repeats its most probable token, and the experts of that
        # token would stay in the processor's cache.
        model.generate(start, new_tokens, temperature=1.0)
        return new_tokens / (time.perf_counter() - begin)

    for model in models:
        model.warm_up()  # else text would flow uncompiled while another process compiles
    rounds = [[once(model) for model in models] for _ in range(8)]
    return [median(rates) for rates in zip(*rounds[1:], strict=True)]


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

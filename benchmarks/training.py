"""Training cost of DS-MoE: against its dense twin, and as a product against a plain loop.

    python benchmarks/training.py --threads 1 --json training.json

Every comparison runs both sides in this process in short blocks by turns, and quotes the median
over rounds of the ratio within a round. Ratios of speed above 1 mean that DS-MoE is faster.

* Twin: `Decoder` with dense gates and the mutual-information loss against the same widths without
  routers, whole training steps (forward, loss, backward, clipping, fused AdamW), eager and with
  compiled blocks.
* Memory: bytes kept between the forward and the backward pass, parameters left out.
* Product: the quickstart, fitted by Lightning with all its callbacks, logger and data, against
  `plain_gpt.py` on the same text. The plain loop runs inside the fit: a callback stops the clock
  every few steps, lets the plain loop take as many, and starts the clock again. No validation
  falls in the measured steps.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from plain_gpt import PlainGPT, training_step, windows
from timing import Comparison, compare, interleave, machine

from lightning_dsmoe import (
    Decoder,
    DSMoELanguageModel,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    TextDataModule,
)
from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.cli import DSMoECLI
from lightning_dsmoe.experts import FeedForward
from lightning_dsmoe.losses import routing_entropies

VOCABULARY = 256


class Size(NamedTuple):
    """A model and a batch for it."""

    name: str
    d_model: int
    n_layers: int
    n_experts: int
    d_expert: int
    n_attention_experts: int
    d_head: int
    batch_size: int
    context: int


NANO = Size("nano, 4 x 128", 128, 4, 16, 32, 4, 32, 12, 64)
SMALL = Size("small, 6 x 512", 512, 6, 32, 64, 8, 64, 4, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch; its default if left out")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each comparison")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"machine": machine(), "speed": {}, "memory": {}}
    for size, calls in ((NANO, 5), (SMALL, 1)):
        for mode in ("eager", "compiled"):
            comparison = compare_with_twin(
                size, rounds=options.rounds, calls=calls, compiled=mode == "compiled"
            )
            results["speed"][f"DS-MoE / dense twin, {size.name}, {mode}"] = comparison._asdict()
        results["memory"][f"DS-MoE / dense twin, {size.name}"] = compare_memory(size)
    comparison = compare_product(rounds=options.rounds)
    results["speed"]["quickstart / plain loop"] = comparison._asdict()
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def ds_moe(size: Size) -> Decoder:
    """The model with routers."""
    return Decoder(
        VOCABULARY,
        size.d_model,
        size.n_layers,
        attention=partial(
            MixtureOfAttentionHeads,
            n_experts=size.n_attention_experts,
            n_heads=1,
            d_head=size.d_head,
        ),
        feed_forward=partial(MixtureOfExperts, n_experts=size.n_experts, d_expert=size.d_expert),
    )


def dense_twin(size: Size) -> Decoder:
    """The same widths without routers."""
    return Decoder(
        VOCABULARY,
        size.d_model,
        size.n_layers,
        attention=partial(
            GroupedQueryAttention,
            n_heads=size.n_attention_experts,
            n_kv_heads=1,
            d_head=size.d_head,
        ),
        feed_forward=partial(FeedForward, d_hidden=size.n_experts * size.d_expert),
    )


def loss(model: Decoder, tokens: Tensor, labels: Tensor, mi_weight: float = 0.05) -> Tensor:
    """Cross entropy, and the mutual-information loss of whatever routers there are."""
    logits, routings = model(tokens)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    for kind in routings:
        probs = [routing.probs for routing in kind if routing is not None]
        if probs:
            conditional, marginal = routing_entropies(torch.stack(probs))
            total = total + mi_weight * (conditional - marginal).sum()
    return total


def compare_with_twin(size: Size, *, rounds: int, calls: int, compiled: bool) -> Comparison:
    """Time training steps of DS-MoE and of its dense twin."""
    torch.manual_seed(0)
    return interleave(
        _trainer(ds_moe(size), size, compiled=compiled),
        _trainer(dense_twin(size), size, compiled=compiled),
        rounds=rounds,
        calls=calls,
    )


def _trainer(model: Decoder, size: Size, *, compiled: bool) -> Callable[[], None]:
    if compiled:
        for block in model.blocks:
            block.compile()
    optimizer = _adamw(model)
    batch = _batch(size)
    return lambda: training_step(model, optimizer, lambda: loss(model, *batch))


def _batch(size: Size) -> tuple[Tensor, Tensor]:
    rows = torch.randint(VOCABULARY, (size.batch_size, size.context + 1))
    return rows[:, :-1], rows[:, 1:]


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)


def compare_memory(size: Size) -> dict[str, float]:
    """Bytes kept for the backward pass by DS-MoE and by its dense twin."""
    candidate, reference = kept_bytes(ds_moe(size), size), kept_bytes(dense_twin(size), size)
    return {"candidate": candidate, "reference": reference, "ratio": candidate / reference}


def kept_bytes(model: Decoder, size: Size) -> int:
    """Bytes of all distinct storages that autograd keeps, parameters left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss(model, *_batch(size))
    size_of_all = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del total  # until here, so that no storage was freed and its address used again
    return size_of_all


class TakeTurns(Callback):
    """Times blocks of training steps, and in between as many steps of another loop.

    Args:
        other: one step of the other loop.
        steps: steps in a block.
        skip: steps before the first block.
    """

    def __init__(self, other: Callable[[], object], *, steps: int, skip: int) -> None:
        self.other = other
        self.steps = steps
        self.skip = skip
        self.own_seconds: list[float] = []
        self.other_seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if batch_idx < self.skip or (batch_idx - self.skip) % self.steps:
            return
        if batch_idx > self.skip:
            self.own_seconds.append((now - self._start) / self.steps)
        start = time.perf_counter()
        for _ in range(self.steps):
            self.other()
        self.other_seconds.append((time.perf_counter() - start) / self.steps)
        self._start = time.perf_counter()


def compare_product(
    *, rounds: int, steps: int = 5, skip: int = 20, overrides: tuple[str, ...] = ()
) -> Comparison:
    """Time the quickstart's training steps and those of a plain loop of the same size.

    Args:
        rounds: rounds of one block of each side.
        steps: steps in a block.
        skip: steps of the quickstart before the first block.
        overrides: further arguments of the command line.
    """
    with tempfile.TemporaryDirectory() as folder:
        cli = _quickstart(
            f"--trainer.logger.init_args.save_dir={folder}",
            f"--trainer.max_steps={skip + rounds * steps + 1}",
            *overrides,
        )
        turns = TakeTurns(_plain_step(cli.datamodule), steps=steps, skip=skip)
        cli.trainer.callbacks.append(turns)
        cli.trainer.fit(cli.model, cli.datamodule)
    return compare(turns.own_seconds, turns.other_seconds[: len(turns.own_seconds)])


def _quickstart(*arguments: str) -> DSMoECLI:
    """The quickstart's model, data and trainer with all its callbacks, ready to fit."""
    config = files("lightning_dsmoe").joinpath("cli_configs", "quickstart.yaml")
    return DSMoECLI(
        DSMoELanguageModel,
        TextDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        run=False,
        args=["-c", str(config), *arguments],
    )


def _plain_step(data: TextDataModule) -> Callable[[], None]:
    """A training step of a plain GPT of the quickstart's size on the quickstart's text."""
    model = PlainGPT(data.vocab_size, d_model=128, n_layers=4, n_heads=4, context=data.context)
    optimizer = _adamw(model)
    span = data.train_dataloader().dataset.tokens
    batches = windows(torch.from_numpy(span.read(0, len(span))), data.batch_size, data.context)

    def cross_entropy() -> Tensor:
        tokens, labels = next(batches)
        return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())

    return lambda: training_step(model, optimizer, cross_entropy)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    on = results["machine"]
    lines = [
        f"{on['cpu']}, {on['threads']} threads, torch {on['torch']}, {on['date']}",
        "",
        "| training step | DS-MoE, ms | reference, ms | speed ratio | quartiles |",
        "|---|---|---|---|---|",
    ]
    for name, values in results["speed"].items():
        low, high = values["spread"]
        lines.append(
            f"| {name} | {1e3 * values['candidate']:.1f} | {1e3 * values['reference']:.1f} "
            f"| {values['ratio']:.3f} | {low:.3f} to {high:.3f} |"
        )
    lines += ["", "| kept for backward | DS-MoE, MB | reference, MB | ratio |", "|---|---|---|---|"]
    for name, values in results["memory"].items():
        lines.append(
            f"| {name} | {values['candidate'] / 1e6:.2f} | {values['reference'] / 1e6:.2f} "
            f"| {values['ratio']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

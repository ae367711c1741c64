"""Training cost of DS-MoE: against its dense twin, and as a product against a plain loop.

    python -m benchmarks.speed.training --threads 1 --json training.json

Every comparison runs both sides in this process in short blocks, alternating, and quotes the median
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
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.plain_gpt import adamw, training_step
from benchmarks.speed.take_turns import TakeTurns
from benchmarks.timing import Comparison, compare, interleave, machine
from lightning_dsmoe import (
    Decoder,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
)
from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.cli import cli_main
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
    """Measure everything and print the tables."""
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
    optimizer = adamw(model)
    batch = _batch(size)
    return lambda: training_step(model, optimizer, lambda: loss(model, *batch))


def _batch(size: Size) -> tuple[Tensor, Tensor]:
    rows = torch.randint(VOCABULARY, (size.batch_size, size.context + 1))
    return rows[:, :-1], rows[:, 1:]


def compare_memory(size: Size) -> dict[str, float]:
    """Bytes kept for the backward pass by DS-MoE and by its dense twin."""
    candidate, reference = kept_bytes(ds_moe(size), size), kept_bytes(dense_twin(size), size)
    return {"candidate": candidate, "reference": reference, "ratio": candidate / reference}


def kept_bytes(model: nn.Module, size: Size) -> int:
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
    config = files("lightning_dsmoe.cli_configs").joinpath("quickstart.yaml")
    with tempfile.TemporaryDirectory() as folder:
        sys.argv[1:] = [
            "fit",
            f"--config={config}",
            f"--trainer.logger.init_args.save_dir={folder}",
            f"--trainer.max_steps={skip + rounds * steps + 1}",
            "--trainer.callbacks+=benchmarks.speed.take_turns.TakeTurns",
            f"--trainer.callbacks.steps={steps}",
            f"--trainer.callbacks.skip={skip}",
            *overrides,
        ]
        [turns] = [c for c in cli_main().trainer.callbacks if isinstance(c, TakeTurns)]
    return compare(turns.own_seconds, turns.plain_seconds[: len(turns.own_seconds)])


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

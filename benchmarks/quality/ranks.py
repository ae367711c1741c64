"""Gradients of two processes against those of one, on the same sequences.

`python -m benchmarks.quality.ranks` prints, for each case, the largest difference of a gradient
relative to the largest gradient of its parameter:

max over parameters of (max |g - g'| / max |g|)

g are the gradients of one process and g' those of two that gloo joins, as the optimizer gets them,
in float32. Each case takes two steps without changing a weight: one with all experts, and one that
SparseFinishing runs under a plan, with a consistency loss.
"""

import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_dsmoe import (
    DSMoELanguageModel,
    LinearRouter,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    TopK,
)
from lightning_dsmoe.callbacks import SparseFinishing
from lightning_dsmoe.data.windows import IGNORED

PLAN = SelectionPlan(experts=TopK(2), attention=TopK(1))
STEPS = {"dense": 0, "sparse finishing": 1}
"""Optimizer steps of a run, by what runs in them."""
SIZES = {"even": (2, 2), "uneven": (1, 3)}
"""Sequences of either rank in the last batch that a step accumulates; before that two each."""
PADDING = ("none", "some", "all of a rank")
VOCABULARY, LENGTH = 11, 6

Gradients = list[dict[str, Tensor]]
"""Of each step, by parameter."""


class Case(NamedTuple):
    """What the two processes do."""

    strategy: str
    accumulated: int
    padding: str
    sizes: str


CASES = [Case(*c) for c in itertools.product(("ddp", "fsdp2"), (1, 3), PADDING, SIZES)]


class Dealt(LightningDataModule):
    """Batches of which each of two ranks gets its part, or one process all."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        rank = None if self.trainer.world_size == 1 else self.trainer.global_rank
        return DataLoader(list(_batches(self.case, rank)), batch_size=None)  # type: ignore[arg-type]


def _batches(case: Case, rank: int | None) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for batch in range(len(STEPS) * case.accumulated):
        is_last = batch % case.accumulated == case.accumulated - 1
        first, second = SIZES[case.sizes] if is_last else (2, 2)
        windows = torch.randint(VOCABULARY, (first + second, LENGTH + 1), generator=generator)
        tokens, labels = windows[:, :-1], windows[:, 1:].clone()
        if case.padding != "none":
            labels[0, 2:] = labels[-1, 4:] = IGNORED
        if case.padding == "all of a rank":
            labels[first:] = IGNORED
        mine = {None: slice(None), 0: slice(first), 1: slice(first, None)}[rank]
        yield {"input_ids": tokens[mine], "labels": labels[mine]}


class KeepGradients(Callback):
    """Keeps what the optimizer is given."""

    def __init__(self) -> None:
        self.steps: Gradients = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        found = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
        self.steps.append({name: gradient.clone() for name, gradient in whole.items()})


def gradients(case: Case, devices: int, data: type[Dealt] = Dealt) -> Gradients:
    """The gradients of both steps, on one device or as one of two ranks."""
    torch.manual_seed(3)
    router = partial(LinearRouter, init_std=1.0)
    heads = partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4, router=router)
    model = DSMoELanguageModel(
        VOCABULARY,
        8,
        2,
        attention=heads,
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=3, router=router),
        expert_mi_weight=1.0,
        attention_mi_weight=1.0,
        load_balancing_weight=0.1,
        router_z_weight=0.1,
        consistency_weight=1.0,
        optimizer=partial(torch.optim.SGD, lr=0.0),
    )
    kept = KeepGradients()
    strategies: dict[str, Any] = {
        "ddp": "ddp",
        "fsdp2": ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1),
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategies[case.strategy] if devices > 1 else "auto",
            max_steps=len(STEPS),
            accumulate_grad_batches=case.accumulated,
            callbacks=[kept, SparseFinishing(PLAN, steps=1)],
            default_root_dir=folder,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data(case))
    return kept.steps


def relative_difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """max over parameters of (max |g - g'| / max |g|)."""
    assert one.keys() == two.keys()
    return max(((two[n] - g).abs().max() / g.abs().max()).item() for n, g in one.items() if g.any())


def gradients_of_rank(rank: int, cases: Sequence[Case] = CASES) -> dict[str, Gradients]:
    """Those of one of two ranks in each case."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "1")  # asked for, but not used, if the group exists
    torch.set_num_threads(1)
    _be_quiet()
    return {str(case): gradients(case, 2) for case in cases}


def differences(
    ranks: list[dict[str, Gradients]], cases: Sequence[Case] = CASES
) -> dict[tuple[Case, str], float]:
    """The larger difference of the two ranks, by case and step."""
    found = {}
    for case in cases:
        one = gradients(case, 1)
        for name, step in STEPS.items():
            two = [rank[str(case)][step] for rank in ranks]
            found[case, name] = max(relative_difference(one[step], each) for each in two)
    return found


def _be_quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _run_rank(rank: int, folder: str, port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    torch.save(gradients_of_rank(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    _be_quiet()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_run_rank, (folder, find_free_network_port()), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
        found = differences([torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)])
    print("| strategy | accumulated batches | padding | batches | dense | sparse finishing |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        measured = " | ".join(f"{found[case, name]:.1e}" for name in STEPS)
        print(f"| {' | '.join(map(str, case))} | {measured} |")
    print(f"\nLargest: {max(found.values()):.1e}")


if __name__ == "__main__":
    main()

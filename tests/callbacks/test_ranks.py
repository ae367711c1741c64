"""Callbacks over two processes with batches of different sizes."""

import csv
import os
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning import Callback, LightningDataModule, Trainer
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.callbacks import (
    ExpertUtilizationMonitor,
    SparseEvaluation,
    SparseFinishing,
    SparsityTarget,
)
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.routing import LinearRouter, SelectionPlan, Threshold, TopK
from lightning_dsmoe.routing.running import running_plan
from lightning_dsmoe.training.language_model import DSMoELanguageModel
from lightning_dsmoe.training.rank_zero import on_rank_zero

SIZES = (1, 3)
WINDOWS = 2 * sum(SIZES)


class UnevenData(LightningDataModule):
    """Two batches for each of two ranks, or all windows for one."""

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.val_dataloader()

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        assert self.trainer is not None
        generator = torch.Generator().manual_seed(5)
        windows = torch.randint(11, (WINDOWS, 7), generator=generator)
        items = [{"input_ids": w[:-1], "labels": w[1:]} for w in windows]
        if self.trainer.world_size == 1:
            return DataLoader(items, batch_size=WINDOWS)  # type: ignore[arg-type]
        first = 2 * SIZES[0]
        mine = (items[:first], items[first:])[self.trainer.global_rank]
        return DataLoader(mine, batch_size=SIZES[self.trainer.global_rank])  # type: ignore[arg-type]


def make_model() -> DSMoELanguageModel:
    torch.manual_seed(3)
    router = partial(LinearRouter, init_std=1.0)
    model = DSMoELanguageModel(
        11,
        8,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4, router=router),
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=3, router=router),
    )
    model.configure_model()
    return model


def make_trainer(folder: Path, devices: int, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,
        logger=CSVLogger(folder, name="logs", version=0),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **options,
    )


def validate(folder: Path, devices: int, *more: Callback) -> dict[str, Tensor]:
    half = SelectionPlan(experts=Threshold(0.5), attention=Threshold(0.5))
    callbacks = [ExpertUtilizationMonitor(), SparseEvaluation({"half": half}), *more]
    trainer = make_trainer(folder, devices, callbacks=callbacks)
    trainer.validate(make_model(), UnevenData(), verbose=False)
    return dict(trainer.callback_metrics)


class SameOnAllRanks(Callback):
    """Fails where ranks have other weights or another plan."""

    def on_before_backward(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        loss = pl_module.routing_loss
        mine = loss.expert_mi, loss.attention_mi, running_plan(pl_module, SelectionPlan())
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        assert ranks == [mine] * len(ranks)


class LongWork(Callback):
    """Fails where ranks do not wait for rank zero beyond the time limit, or not in vain."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.2))
        done: list[Any] = []
        on_rank_zero(trainer, lambda: done.append(time.sleep(1)))
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60))
        assert len(done) == trainer.is_global_zero

        def fail() -> None:
            raise KeyError("no room")

        error = KeyError if trainer.is_global_zero else RuntimeError
        with pytest.raises(error, match="no room"):
            on_rank_zero(trainer, fail)


def fit(folder: Path, devices: int, *more: Callback, **options: Any) -> None:
    """A fit that controls the weights at each step, and logs them."""
    target = SparsityTarget(expert_top_k=2, attention_top_k=1, mass=0.9, rate=1.5, every=1, delay=0)
    trainer = make_trainer(
        folder, devices, callbacks=[target, *more], log_every_n_steps=1, **options
    )
    trainer.fit(make_model(), UnevenData())


def first_row(folder: Path) -> dict[str, str]:
    """What was logged after the first step."""
    [path] = folder.rglob("metrics.csv")
    with path.open() as file:
        return next(row for row in csv.DictReader(file) if row["train/expert_mi_weight"])


def run_rank(rank: int, folder: Path, port: int) -> None:
    """All runs of a rank, since starting processes takes longer than they do."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ.update(address)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.save(validate(folder / "validated", 2, LongWork()), folder / f"{rank}.pt")
    finishing = SparseFinishing(SelectionPlan(experts=TopK(1)), steps=2)
    options = {"max_steps": 3, "accumulate_grad_batches": 2}
    fit(folder / "fitted", 2, SameOnAllRanks(), finishing, **options)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (folder, find_free_network_port())
    mp.start_processes(run_rank, arguments, nprocs=2, start_method="spawn")
    return folder


pytestmark = [pytest.mark.ddp, pytest.mark.slow]


def test_two_ranks_report_as_one_process(two_ranks: Path, tmp_path: Path) -> None:
    one = validate(tmp_path, 1)
    # Not what is a mean over batches of something that is not linear, as the entropies of a batch
    # are: a batch holds other windows on two ranks. Those of the monitor are of the whole split.
    whole = ("loss", "active_share", "gap")
    names = [n for n in one if "/layer_" in n or (n.startswith("val/") and n.endswith(whole))]
    assert {n for n in names if "/sparse/" in n} == {f"val/sparse/half/{each}" for each in whole}
    assert len(names) == 2 * 2 * 5 + 3 + 1
    for rank in range(2):
        two = torch.load(two_ranks / f"{rank}.pt")
        for name in names:
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=name)
    (folder,) = (two_ranks / "validated").rglob("utilization")
    assert {path.name for path in folder.iterdir()} == {"val_step_00000000.png", "last.png"}


def test_two_ranks_control_the_weights_as_one_process(two_ranks: Path, tmp_path: Path) -> None:
    """A step on two batches of each rank, against one on all their windows; then two more."""
    fit(tmp_path, 1, max_steps=1)
    one, two = first_row(tmp_path), first_row(two_ranks / "fitted")
    for kind in ("expert", "attention"):
        name = f"train/{kind}_mi_weight"
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-5)
        assert float(one[name]) != 0.02
    for kind in ("experts", "attention"):
        name = f"train/{kind}/top_mass"
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-6)

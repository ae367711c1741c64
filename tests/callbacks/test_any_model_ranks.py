"""The callbacks on a model that is not ours: two processes report and train as one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Subset

from lightning_dsmoe import SelectionPlan, TopK
from lightning_dsmoe.callbacks import (
    ExpertUtilizationMonitor,
    SparseEvaluation,
    SparseFinishing,
    SparsityTarget,
)

from ..ranks import on_two_ranks
from .classifier import Sequences, classifier

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

PLAN = SelectionPlan(experts=TopK(1))


class Dealt(LightningDataModule):
    """Half of each training batch for each of two ranks; in validation 1 of 4 and 3 of 4."""

    def loader(self, ranks: list[list[int]]) -> DataLoader[Any]:
        assert self.trainer is not None
        steps = len(ranks[0]) // (len(ranks[0]) // 2)
        if self.trainer.world_size == 1:
            mine = [i for s in range(steps) for r in ranks for i in _part(r, s, steps)]
        else:
            mine = ranks[self.trainer.global_rank]
        return DataLoader(Subset(Sequences(16), mine), batch_size=len(mine) // steps)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader([list(range(4)), list(range(4, 8))])

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader([[8, 9], list(range(10, 16))])


def _part(items: list[int], step: int, steps: int) -> list[int]:
    size = len(items) // steps
    return items[step * size : (step + 1) * size]


def fit(devices: int) -> dict[str, Any]:
    """All that is logged in two steps, and the weights after them."""
    evaluation = SparseEvaluation({"top_1": PLAN})
    callbacks = [
        ExpertUtilizationMonitor(every_n_steps=1, window=1),
        SparsityTarget(expert_top_k=1, mass=0.95, rate=1.5, every=1, delay=0),
        SparseFinishing(PLAN, steps=1),
        evaluation,
    ]
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=2,
        logger=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=os.environ["ROOT_OF_RUNS"],
    )
    model = classifier()
    trainer.fit(model, Dealt())
    logged = {n: v for n, v in trainer.callback_metrics.items() if not n.startswith("train/loss")}
    logged["gap in results"] = torch.tensor(evaluation.results["top_1"].relative_gap)
    return {"logged": logged, "weights": dict(model.state_dict())}


def test_two_ranks_are_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOT_OF_RUNS", str(tmp_path))
    one = fit(1)
    for found in on_two_ranks(_with_environment, tmp_path):
        assert found["logged"].keys() == one["logged"].keys()
        assert {"val/sparse/top_1/accuracy", "train/experts/top_mass"} <= found["logged"].keys()
        for kind in ("logged", "weights"):
            for name, value in one[kind].items():
                torch.testing.assert_close(found[kind][name], value, rtol=2e-5, atol=2e-6, msg=name)


def _with_environment(rank: int) -> dict[str, Any]:
    """Lightning takes a group that is there already, and asks for the rank."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return fit(2)

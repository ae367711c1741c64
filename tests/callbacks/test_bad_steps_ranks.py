"""Two processes leave out the same steps, and measure routers as one does."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dsmoe.callbacks import RouterCollapseAlarm, SkipNonFiniteSteps

from ..ranks import on_two_ranks
from .classifier import classifier
from .test_any_model_ranks import Dealt
from .test_ranks import UnevenData, make_model

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


class SpoilOneRank(Callback):
    """Tells one rank alone of a loss that is not finite, in one batch; notes all weights."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if trainer.global_rank == 1 and trainer.fit_loop.batch_idx == 1:
            loss.data.fill_(float("nan"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in pl_module.parameters()]
        self.weights.append(torch.cat([p.detach().flatten() for p in whole]))


def make_trainer(strategy: Any, devices: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=3,
        callbacks=list(callbacks),
        gradient_clip_val=1.0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def skip(strategy: Any) -> dict[str, Any]:
    spoil, skipping = SpoilOneRank(), SkipNonFiniteSteps(limit=1)
    trainer = make_trainer(strategy(), 2, spoil, skipping)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(make_model(), UnevenData())
    stopped = ""
    try:
        make_trainer(strategy(), 2, SpoilOneRank(), SkipNonFiniteSteps(limit=0)).fit(
            make_model(), UnevenData()
        )
    except FloatingPointError as error:
        stopped = str(error)
    changed = [
        not torch.equal(a, b) for a, b in zip(spoil.weights[:-1], spoil.weights[1:], strict=True)
    ]
    return {
        "skipped": skipping.skipped,
        "changed": changed,
        "finite": bool(spoil.weights[-1].isfinite().all()),
        "stopped": stopped,
        "warned": [str(each.message) for each in told if "is left out" in str(each.message)],
    }


def effective(devices: int) -> dict[str, float]:
    alarm = RouterCollapseAlarm(every_n_steps=2, share=0.01)
    make_trainer("ddp" if devices > 1 else "auto", devices, alarm).fit(classifier(), Dealt())
    return alarm.results


def run(rank: int) -> dict[str, Any]:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return {
        "ddp": skip(lambda: "ddp"),
        "fsdp2": skip(lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)),
        "effective": effective(2),
    }


def test_two_ranks_leave_out_the_same_steps_and_share_their_tokens(tmp_path: Path) -> None:
    one = effective(1)
    ranks = on_two_ranks(run, tmp_path)
    for rank, found in enumerate(ranks):
        for strategy in ("ddp", "fsdp2"):
            assert found[strategy]["skipped"] == 1
            assert found[strategy]["changed"] == [False, True]
            assert found[strategy]["finite"]
            stopped = found[strategy]["stopped"]
            assert "no step was taken, and limit=0 others" in stopped
            assert f"rank {rank} of 2" in stopped
            assert "largest outputs: decoder.embedding" in stopped
        assert found["effective"] == pytest.approx(one, rel=1e-6)
    for strategy in ("ddp", "fsdp2"):
        for found in ranks:
            stopped = found[strategy]["stopped"]
            assert stopped.startswith("rank 1: the loss is nan at step 1, batch 1; no step")
        [warned] = ranks[0][strategy]["warned"]
        assert warned.startswith("rank 1: the loss is nan at step 1, batch 1; the step is left")
        assert "(epoch 0, batch 1 of the epoch, rank 1 of 2" in warned

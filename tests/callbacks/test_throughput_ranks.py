"""Throughput of two processes, whose tokens add up, also where the model is sharded."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_dsmoe.callbacks import ThroughputMonitor, throughput_monitor

from ..ranks import on_two_ranks
from .test_ranks import SIZES, UnevenData, make_model

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


class OneBatchASecond(ThroughputMonitor):
    """Measures its third batch and no more."""

    def on_after_backward(self, *arguments: Any) -> None:
        super().on_after_backward(*arguments)
        self.now += 1

    now = 0.0


def fit(strategy: Any) -> dict[str, float]:
    monitor = OneBatchASecond()
    throughput_monitor._now = lambda device: monitor.now
    model = make_model()
    # Fused AdamW takes sharded parameters too, and clipping before it.
    model.optimizer = partial(torch.optim.AdamW, fused=True)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=3,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, UnevenData())
    return monitor.results


def run(rank: int) -> dict[str, dict[str, float]]:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"ddp": fit(DDPStrategy()), "sharded": fit(sharded)}


def test_tokens_of_all_processes_count(tmp_path: Path) -> None:
    one_token = 6 * sum(p.numel() for p in make_model().parameters() if p.ndim > 1)
    one_token += 12 * 2 * (2 * 4) * 6  # two layers of two heads of four channels, six positions
    for found in on_two_ranks(run, tmp_path):
        for results in found.values():
            tokens = sum(SIZES) * 6
            assert results["train/tokens_per_sec"] == tokens
            flops = pytest.approx(tokens * one_token, rel=0.02)  # losses of routers are not in it
            assert results["train/flops_per_sec"] == flops

"""Callbacks on two processes that share the model, as on two with the whole model each.

`test_ranks.py` compares the latter with one process.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_dsmoe import SelectionPlan, Threshold, TopK
from lightning_dsmoe.callbacks import (
    ExpertUtilizationMonitor,
    MIWeightAnnealing,
    SparseCompile,
    SparseEvaluation,
    SparseFinishing,
    SparsityTarget,
    ThroughputMonitor,
)

from ..ranks import on_two_ranks
from .test_ranks import UnevenData, make_model

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

HALF = SelectionPlan(experts=Threshold(0.5), attention=Threshold(0.5))
SETTERS: dict[str, Callable[[], Any]] = {
    "target": lambda: SparsityTarget(
        expert_top_k=2, attention_top_k=1, mass=0.9, rate=1.5, every=1, delay=0
    ),
    "annealing": lambda: MIWeightAnnealing(start=0.5, steps=4),
}


def trainer_of(strategy: Any, callbacks: list[Any]) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=2,
        log_every_n_steps=1,
        default_root_dir=os.environ["ROOT_OF_RUNS"],
        use_distributed_sampler=False,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def logged(strategy: Any, setter: str) -> dict[str, Any]:
    """All that a run with all callbacks logs, but its speed."""
    evaluation, throughput = SparseEvaluation({"half": HALF}), ThroughputMonitor(every_n_steps=1)
    callbacks = [
        ExpertUtilizationMonitor(every_n_steps=1, window=1),
        SETTERS[setter](),
        SparseFinishing(SelectionPlan(experts=TopK(1)), steps=1),
        evaluation,
        throughput,
    ]
    trainer = trainer_of(strategy, callbacks)
    trainer.fit(make_model(), UnevenData())
    found = {n: v for n, v in trainer.callback_metrics.items() if "per_sec" not in n}
    found["gap in results"] = torch.tensor(evaluation.results["half"].relative_gap)
    return found


def run(rank: int) -> dict[str, Any]:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for setter in SETTERS:
        found[f"whole {setter}"] = logged("ddp", setter)
        found[f"shared {setter}"] = logged(sharded(), setter)
    with pytest.raises(ValueError, match="lightning-dsmoe compile") as error:
        trainer_of(sharded(), [SparseCompile(HALF)]).fit(make_model(), UnevenData())
    found["refused"] = str(error.value)
    return found


def test_callbacks_on_a_shared_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOT_OF_RUNS", str(tmp_path))
    for found in on_two_ranks(run, tmp_path):
        assert found["refused"].startswith("SparseCompile needs whole weights")
        for setter in SETTERS:
            whole, shared = found[f"whole {setter}"], found[f"shared {setter}"]
            assert whole.keys() == shared.keys()
            assert "val/sparse/half/loss" in whole
            for name, value in whole.items():
                torch.testing.assert_close(shared[name], value, rtol=2e-5, atol=2e-6, msg=name)
    assert len(list(tmp_path.rglob("last.png"))) == 4

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor

from lightning_dsmoe.callbacks import ExpertUtilizationMonitor
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.metrics import Utilization, expert_utilization
from lightning_dsmoe.routing import LinearRouter
from lightning_dsmoe.training.language_model import DSMoELanguageModel

pytestmark = pytest.mark.slow


class Recorder(Callback):
    """Keeps what every step returned."""

    def __init__(self) -> None:
        self.train: list[Any] = []
        self.val: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self.train.append(outputs)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.val = []

    def on_validation_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, *args: Any
    ) -> None:
        self.val.append(outputs)

    @staticmethod
    def utilization(outputs: list[Any], kind: str, layer: int) -> Utilization:
        probs = [getattr(out["routings"], kind)[layer].probs.flatten(0, 1) for out in outputs]
        return expert_utilization(
            torch.cat(probs), torch.cat([o["mask"].flatten() for o in outputs])
        )


class DeadRouter(LinearRouter):
    """Gives experts 1 and 3 a score of -1e4."""

    def score(self, x: Tensor) -> Tensor:
        offset = torch.zeros(self.n_experts)
        offset[1::2] = -1e4
        return super().score(x) + offset


def name_of(kind: str, layer: int) -> str:
    return f"decoder.blocks.{layer}.{'feed_forward' if kind == 'experts' else 'attention'}"


def check(results: Any, outputs: list[Any]) -> None:
    for kind in ("experts", "attention"):
        for layer in range(2):
            expected = Recorder.utilization(outputs, kind, layer)
            torch.testing.assert_close(results[kind][name_of(kind, layer)], expected)


@pytest.mark.parametrize(("every_n_steps", "window", "first"), [(4, 3, 5), (8, 1, 7)])
def test_reports_are_those_of_the_last_batches_and_of_the_validation(
    every_n_steps: int,
    window: int,
    first: int,
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    """Validation in the middle of a window leaves the training report as it is."""
    recorder = Recorder()
    monitor = ExpertUtilizationMonitor(every_n_steps=every_n_steps, window=window)
    trainer = make_trainer(max_steps=9, val_check_interval=7, callbacks=[recorder, monitor])
    trainer.fit(model, make_loader(9), make_loader(3, seed=1))

    check(monitor.results["train"], recorder.train[first:8])
    check(monitor.results["val"], recorder.val)


def test_two_that_would_log_different_numbers_are_refused(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    monitors = [ExpertUtilizationMonitor(), ExpertUtilizationMonitor(every_n_steps=20)]
    with pytest.raises(ValueError, match=r"only one, got every_n_steps=20, .*; every_n_steps=100,"):
        make_trainer(callbacks=monitors).validate(model, make_loader(1), verbose=False)
    make_trainer(callbacks=monitors[:1] * 2).validate(model, make_loader(1), verbose=False)


def test_logs_scalars_of_every_router(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    monitor = ExpertUtilizationMonitor(every_n_steps=2, window=1)
    trainer = make_trainer(max_steps=4, callbacks=[monitor])
    trainer.fit(model, make_loader(4), make_loader(1))
    with (Path(str(trainer.log_dir)) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [row["step"] for row in rows if row["train/experts/layer_00/effective"]]
    assert steps == ["2", "4"]
    for stage in ("train", "val"):
        for kind in ("experts", "attention"):
            for layer in range(2):
                used = monitor.results[stage][kind][name_of(kind, layer)]
                name = f"{stage}/{kind}/layer_{layer:02d}"
                logged = {
                    "effective": used.effective,
                    "entropy": used.entropy,
                    "conditional_entropy": used.conditional_entropy,
                    "max_share": used.share.max(),
                    "dead": used.dead.sum(),
                }
                for key, value in logged.items():
                    assert trainer.callback_metrics[f"{name}/{key}"] == value
                    assert any(row[f"{name}/{key}"] for row in rows)


def test_names_exactly_the_dead_experts(
    make_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    model = make_model(
        feed_forward=partial(MixtureOfExperts, n_experts=5, d_expert=3, router=DeadRouter)
    )
    monitor = ExpertUtilizationMonitor()
    trainer = make_trainer(callbacks=[monitor])
    trainer.validate(model, make_loader(2), verbose=False)
    dead = {
        kind: [used.dead_experts for used in layers.values()]
        for kind, layers in monitor.results["val"].items()
    }
    assert dead == {"experts": [[1, 3]] * 2, "attention": [[]] * 2}
    assert trainer.callback_metrics["val/experts/layer_01/dead"] == 2


def test_draws_every_validation(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer(
        max_steps=4, val_check_interval=2, callbacks=[ExpertUtilizationMonitor()]
    )
    trainer.fit(model, make_loader(4), make_loader(1))
    folder = Path(str(trainer.log_dir)) / "utilization"
    assert {path.name for path in folder.iterdir()} == {
        "val_step_00000002.png",
        "val_step_00000004.png",
        "last.png",
    }
    assert (folder / "last.png").read_bytes() == (folder / "val_step_00000004.png").read_bytes()
    assert matplotlib.image.imread(folder / "last.png").std() > 0


def test_without_validation_draws_the_last_training_report(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    monitor = ExpertUtilizationMonitor(every_n_steps=2, window=2)
    trainer = make_trainer(max_steps=3, limit_val_batches=0, callbacks=[monitor])
    trainer.fit(model, make_loader(3), make_loader(1))
    folder = Path(str(trainer.log_dir)) / "utilization"
    assert {path.name for path in folder.iterdir()} == {"train_step_00000003.png", "last.png"}


def test_sanity_check_reports_nothing(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    monitor = ExpertUtilizationMonitor()
    seen = []

    class Watch(Callback):
        def on_sanity_check_end(self, trainer: Trainer, pl_module: Any) -> None:
            seen.append((dict(monitor.results), Path(str(trainer.log_dir), "utilization").exists()))

    trainer = make_trainer(max_steps=1, callbacks=[monitor, Watch()])
    trainer.fit(model, make_loader(1), make_loader(2))
    assert seen == [({}, False)]


def test_fast_dev_run_writes_nothing(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = ExpertUtilizationMonitor(every_n_steps=1, window=1)
    trainer = make_trainer(fast_dev_run=True, callbacks=[monitor])
    trainer.fit(model, make_loader(2), make_loader(2))
    assert set(monitor.results) == {"train", "val"}
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "got window=0, every_n_steps=100"),
        ({"every_n_steps": 5, "window": 6}, "got window=6, every_n_steps=5"),
        ({"dead_share": 1.5}, r"dead_share must be in \[0, 1\), got 1.5"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertUtilizationMonitor(**options)

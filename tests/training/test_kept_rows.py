"""A run that resumes in the folder of an earlier one adds to its metrics."""

import csv
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_dsmoe.training.kept_rows import keep_rows


def trainer_in(folder: Path) -> Trainer:
    logger = CSVLogger(folder, name="run", version=0)
    return Trainer(
        accelerator="cpu", devices=1, logger=logger, max_steps=1, default_root_dir=folder
    )


def log(trainer: Trainer, step: int, **metrics: float) -> None:
    trainer.loggers[0].log_metrics(metrics, step)
    trainer.loggers[0].save()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "version_0" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_kept_with_the_columns_of_both(tmp_path: Path) -> None:
    log(trainer_in(tmp_path), 1, loss=2.0, speed=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = trainer_in(tmp_path)
        keep_rows(resumed)
        log(resumed, 2, loss=1.0)
        log(resumed, 3, val=0.5)
    assert rows(tmp_path) == [
        {"loss": "2.0", "speed": "3.0", "step": "1", "val": ""},
        {"loss": "1.0", "speed": "", "step": "2", "val": ""},
        {"loss": "", "speed": "", "step": "3", "val": "0.5"},
    ]
    assert [path.name for path in (tmp_path / "run" / "version_0").iterdir()] == ["metrics.csv"]


class Logs(LightningModule):
    """Logs a number in each step."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number, self.weight = number, torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.log("number", self.number)
        return self.weight * batch.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:.* exists and is not empty")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_are_taken_again_have_one_row(
    accumulate: int, tmp_path: Path, make_trainer: Callable[..., Trainer]
) -> None:
    def fit(number: float, max_steps: int, ckpt_path: Path | None = None) -> list[tuple[int, str]]:
        trainer = make_trainer(
            max_steps=max_steps,
            accumulate_grad_batches=accumulate,
            logger=CSVLogger(tmp_path, name="run", version=0),
            callbacks=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1),
            enable_checkpointing=True,
        )
        if ckpt_path is not None:
            keep_rows(trainer)
        loader = DataLoader(torch.ones(40))
        trainer.fit(Logs(number), loader, ckpt_path=ckpt_path, weights_only=True)
        return [(int(row["step"]), row["number"]) for row in rows(tmp_path)]

    assert len(fit(1.0, 5)) == 5
    checkpoint = tmp_path / "step=3.ckpt"
    first = [(step, "1.0") for step in range(3)]
    assert fit(2.0, 7, checkpoint) == [*first, *((step, "2.0") for step in range(3, 7))]
    assert fit(3.0, 5, checkpoint) == [*first, *((step, "3.0") for step in range(3, 5))]


def test_lightning_still_deletes_them() -> None:
    """Once it no longer does, this module can go."""
    import inspect

    from lightning.pytorch.loggers.csv_logs import ExperimentWriter

    assert "rm_file" in inspect.getsource(ExperimentWriter._check_log_dir_exists)


def test_a_new_folder_and_other_loggers_are_left_alone(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    keep_rows(trainer)
    keep_rows(Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path))
    log(trainer, 1, loss=2.0)
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("content", [b"", b"loss,step\n", b"\xff\n"])
def test_files_without_rows(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    resumed = trainer_in(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keep_rows(resumed)
        log(resumed, 1, loss=2.0)
    assert rows(tmp_path) == [{"loss": "2.0", "step": "1"}]

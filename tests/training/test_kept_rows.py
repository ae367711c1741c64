"""A run that resumes in the folder of an earlier one adds to its metrics."""

import csv
import warnings
from pathlib import Path

import pytest
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_dsmoe.files import hidden_beside
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


@pytest.mark.parametrize("content", ["", "loss,step\n"])
def test_files_without_rows(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    resumed = trainer_in(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keep_rows(resumed)
        log(resumed, 1, loss=2.0)
    assert rows(tmp_path) == [{"loss": "2.0", "step": "1"}]


def test_a_file_of_a_run_that_was_killed_while_it_was_aside_is_found(tmp_path: Path) -> None:
    log(trainer_in(tmp_path), 1, loss=2.0)
    path = tmp_path / "run" / "version_0" / "metrics.csv"
    path.rename(hidden_beside(path))
    resumed = trainer_in(tmp_path)
    keep_rows(resumed)
    log(resumed, 2, loss=1.0)
    assert [row["loss"] for row in rows(tmp_path)] == ["2.0", "1.0"]


def test_a_file_that_is_no_text_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "run" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"metrics\.csv is no table to add rows to"):
        keep_rows(trainer_in(tmp_path))
    assert path.read_bytes() == b"\xff\n"

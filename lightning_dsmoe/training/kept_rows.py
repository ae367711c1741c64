"""Rows of `metrics.csv` that an earlier run has written into the folder that a run resumes in."""

import csv
import warnings
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info

from lightning_dsmoe.files import atomic_path, hidden_beside


def keep_rows(trainer: Trainer) -> None:
    """Let CSV loggers go on with the rows that are there, which Lightning 2.6.6 deletes.

    It does so when a logger is first used, so call this before. Rows of steps that the run takes
    again, since they came after its checkpoint, are removed when training starts: they are of
    weights that nothing holds any more, and each step keeps one value.

    Args:
        trainer: a trainer that is about to resume.

    Examples:
        >>> from lightning import Trainer
        >>> from lightning_dsmoe.training.kept_rows import keep_rows
        >>> trainer = Trainer(accelerator="cpu", logger=False)
        >>> keep_rows(trainer)  # and then trainer.fit(model, data, ckpt_path="last.ckpt")
    """
    if not trainer.is_global_zero:
        return
    loggers = [each for each in trainer.loggers if isinstance(each, CSVLogger)]
    for logger in loggers:
        path = Path(logger.log_dir, ExperimentWriter.NAME_METRICS_FILE)
        if path.is_file() and (columns := _rows(path)[0]):
            _open(logger, path, columns)
            trainer.callbacks.append(_WithoutLaterRows(path))  # type: ignore[attr-defined]


class _WithoutLaterRows(Callback):
    """Removes the rows of steps that a run takes again, once its first step is known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        columns, rows = _rows(self.path)
        if "step" not in columns:
            return
        at = columns.index("step")
        kept = [row for row in rows if not _is_from(row[at:][:1], trainer.global_step)]
        if len(kept) == len(rows):
            return
        with atomic_path(self.path) as path, path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *kept])
        rank_zero_info(
            f"{self.path}: {len(rows) - len(kept)} rows of steps from {trainer.global_step} on are "
            "written anew"
        )


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """The names of the columns and the rows; none in an empty file, or one that is not text."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            return next(reader, []), [row for row in reader if row]
    except (UnicodeDecodeError, csv.Error):
        return [], []


def _is_from(cell: list[str], step: int) -> bool:
    """Whether a row's step is this one or later; a row cut by a full disk may have none."""
    return cell != [] and cell[0].isdecimal() and int(cell[0]) >= step


def _open(logger: CSVLogger, path: Path, columns: list[str]) -> None:
    """Make a logger's writer while the file is elsewhere, so that it is not deleted."""
    aside = hidden_beside(path)
    path.rename(aside)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* exists and is not empty")
            logger.experiment.metrics_keys = columns
    finally:
        aside.rename(path)

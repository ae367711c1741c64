"""Rows of `metrics.csv` that an earlier run has written into the folder that a run resumes in."""

import csv
import warnings
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lightning_dsmoe.files import hidden_beside


def keep_rows(trainer: Trainer) -> None:
    """Let CSV loggers add to the rows that are there, which Lightning 2.6.6 deletes.

    It does so when a logger is first used, so call this before. Steps that a run takes again, since
    they came after its checkpoint, have two rows; the later one is of the weights that remain.

    Args:
        trainer: a trainer that is about to resume.

    Raises:
        ValueError: if the file that is there is no table of text.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            _keep(logger, Path(logger.log_dir, ExperimentWriter.NAME_METRICS_FILE))


def _keep(logger: CSVLogger, path: Path) -> None:
    if not path.is_file():
        for aside in path.parent.glob(f".{path.name}.*"):  # of a run killed before it put it back
            aside.rename(path)
    if not path.is_file():
        return
    try:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table to add rows to, move it elsewhere: {error}") from None
    if not columns:
        return
    aside = hidden_beside(path)
    path.rename(aside)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* exists and is not empty")
            logger.experiment.metrics_keys = columns
    finally:
        aside.rename(path)

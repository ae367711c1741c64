"""The folder for the files that callbacks write."""

from pathlib import Path
from weakref import WeakKeyDictionary

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_dsmoe.training.last_checkpoint import version_name

_FOLDERS: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> Path | None:
    """The folder of a trainer's run, the same on all ranks; None with `fast_dev_run`.

    Call on all ranks. It is the first logger's directory, name and version, where `ModelCheckpoint`
    has its folder of checkpoints if there are all three. `Trainer.log_dir` has name and version
    only for the CSV and the TensorBoard logger; with any other, runs would replace each other's
    files. Where the logger has no version, it is a new folder `version_0`, `version_1` and so on
    for each trainer.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if trainer not in _FOLDERS:
        # Only on rank zero do loggers know the version that their server gave.
        folder = _folder(trainer) if trainer.is_global_zero else Path()
        _FOLDERS[trainer] = trainer.strategy.broadcast(folder)
    return _FOLDERS[trainer]


def _folder(trainer: Trainer) -> Path:
    if not trainer.loggers:
        return _new_version(Path(trainer.default_root_dir))
    logger = trainer.loggers[0]
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        return Path(logger.log_dir)
    parent = Path(logger.save_dir or trainer.default_root_dir) / (logger.name or "")
    return _new_version(parent) if logger.version is None else parent / version_name(logger)


def _new_version(parent: Path) -> Path:
    """Make the next of the numbered folders; runs that start at once do not get the same."""
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [path.name.removeprefix("version_") for path in parent.glob("version_*")]
    number = 1 + max((int(n) for n in numbers if n.isdecimal()), default=-1)
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder

"""The newest checkpoint of a run, or of the version of it before."""

import re
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dsmoe.serialization.archive import check_archive
from lightning_dsmoe.serialization.sharded_folder import META, read_index
from lightning_dsmoe.training.leftovers import is_written, leftovers

_SHOWN = 3


def find_last_checkpoint(trainer: Trainer) -> str:
    """Path of the newest complete checkpoint, or `last` where that is Lightning's to look for.

    It lies where this run writes its own, or else in the latest version folder of the logger that
    has one. Lightning 2.6.6 looks in the folder of this run alone, which is new in most runs, takes
    whatever is there, and starts from scratch if nothing is.

    Args:
        trainer: a trainer that is about to run. Remote addresses are left to Lightning.

    Raises:
        FileNotFoundError: if there is no complete checkpoint.
    """
    own = _own_folders(trainer)
    if any("://" in folder for folder in own):
        return "last"
    groups = [[Path(folder).expanduser() for folder in own]]
    callbacks = trainer.checkpoint_callbacks
    if any(isinstance(c, ModelCheckpoint) and c.dirpath is None for c in callbacks):
        groups += [[folder] for folder in _earlier_versions(trainer)]
    for folders in groups:
        found = [path for folder in folders for path in _candidates(folder)]
        for path in sorted(found, key=lambda path: -path.stat().st_mtime_ns):
            if _is_complete(path):
                return str(path)
    looked = list(dict.fromkeys(str(folder) for folders in groups for folder in folders))
    raise FileNotFoundError(
        "no complete checkpoint for ckpt_path=last in "
        + (", ".join(looked[:_SHOWN]) or "any folder, since no ModelCheckpoint is configured")
        + (f" and {len(looked) - _SHOWN} other versions" if len(looked) > _SHOWN else "")
    )


def written_checkpoint(trainer: Trainer) -> str | None:
    """Path of the newest checkpoint that the callbacks of a trainer have written, None without."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    paths = [Path(p) for c in callbacks for p in (c.last_model_path, c.best_model_path) if p]
    there = [path for path in paths if path.exists()]
    return str(max(there, key=lambda path: path.stat().st_mtime_ns)) if there else None


def logger_folder(trainer: Trainer) -> str:
    """Folder of all versions of the first logger; a string, since it may be a remote address.

    Args:
        trainer: has a logger.
    """
    logger = trainer.loggers[0]
    save_dir = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    return f"{save_dir}/{logger.name}"


def version_name(logger: Logger) -> str:
    """Name of a logger's version as a folder."""
    version = logger.version
    return version if isinstance(version, str) else f"version_{version}"


def _own_folders(trainer: Trainer) -> list[str]:
    """Where the callbacks of this run write checkpoints, as Lightning decides in `setup`."""
    folders: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint | OnExceptionCheckpoint) and callback.dirpath:
            folders.append(str(callback.dirpath))
        elif isinstance(callback, ModelCheckpoint) and trainer.loggers:
            version = version_name(trainer.loggers[0])
            folders.append(f"{logger_folder(trainer)}/{version}/checkpoints")
        elif isinstance(callback, ModelCheckpoint):
            folders.append(f"{trainer.default_root_dir}/checkpoints")
    return folders


def _earlier_versions(trainer: Trainer) -> list[Path]:
    """Folders of checkpoints of all versions, the latest first."""
    if not trainer.loggers:
        return []

    def age(folder: Path) -> tuple[int, int]:
        number = re.fullmatch(r"version_(\d+)", folder.parent.name)
        return (int(number[1]) if number else -1, folder.stat().st_mtime_ns)

    folders = Path(logger_folder(trainer)).expanduser().glob("*/checkpoints")
    return sorted(folders, key=age, reverse=True)


def _candidates(folder: Path) -> list[Path]:
    """Checkpoints of a folder, with those that a killed run was about to put into their places."""
    names = list(folder.glob(f"[!.]*{ModelCheckpoint.FILE_EXTENSION}"))
    names += [path for path in leftovers(folder) if is_written(path)]
    return [path for path in names if path.exists()]


def _is_complete(path: Path) -> bool:
    try:
        if path.is_dir():  # as strategies that shard write
            read_index(path)
            check_archive(path / META)
        else:
            check_archive(path)
    except (ValueError, OSError) as error:
        rank_zero_warn(f"{path} is damaged and skipped: {error}")
        return False
    return True

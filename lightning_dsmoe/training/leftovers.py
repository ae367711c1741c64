"""What killed runs leave of checkpoints that they were writing, replacing or deleting."""

import re
import time
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dsmoe.folders import remove
from lightning_dsmoe.serialization.archive import check_archive
from lightning_dsmoe.serialization.sharded_folder import META, read_index

_NAME = re.compile(r"\..+\.ckpt\.[0-9a-f]{32}(\.old)?")
"""As `files.hidden_beside` names what takes the place of a checkpoint."""

_UNIQUE = re.compile(r"\.[0-9a-f]{32}(\.old)?$")
_RECENT = 3600.0
"""Seconds since its last change in which another run may still write it."""


def leftovers(folder: Path) -> list[Path]:
    """Hidden files and folders of checkpoints; nobody but this library names any like that.

    Args:
        folder: where checkpoints are.
    """
    return [path for path in folder.glob(".*") if _NAME.fullmatch(path.name)]


def is_written(path: Path) -> bool:
    """Whether a hidden checkpoint is written to its end, so that only its name was missing.

    Args:
        path: the file or folder.
    """
    try:
        if path.is_dir():
            read_index(path)
        check_archive(path / META if path.is_dir() else path, checksums=False)
    except (ValueError, OSError):
        return False
    return True


def remove_leftovers(trainer: Trainer) -> None:
    """Delete leftovers from the folders of a run, but for the one that it was resumed from.

    What changed in the last hour stays, an earlier checkpoint that nothing has replaced, and, with
    a warning, one that is whole and newer than all others: it may be all of a run's last hours.

    Args:
        trainer: has begun to train.
    """
    if not trainer.is_global_zero:
        return
    resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
    places = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    # Under SLURM, checkpoints for the next run of a job are in the last one.
    for place in {str(each) for each in (*places, trainer.default_root_dir) if each}:
        if "://" not in place:
            _clean(Path(place).expanduser(), resumed)


def _clean(folder: Path, resumed: Path | None) -> None:
    found = [path for path in leftovers(folder) if path.resolve() != resumed]
    if not found:
        return
    others = [*folder.glob(f"[!.]*{ModelCheckpoint.FILE_EXTENSION}")]
    if resumed is not None and resumed.parent == folder.resolve():
        others.append(resumed)
    latest = max(map(_changed, others), default=0)
    kept = [path for path in found if _changed(path) > latest and is_written(path)]
    if kept:
        rank_zero_warn(
            "a run was killed before it could rename a whole checkpoint, newer than all others "
            f"there; resume from it with ckpt_path, or delete it: {', '.join(map(str, kept))}"
        )
    for path in found:
        if path not in kept and not _is_needed(path):
            remove(path)


def _changed(path: Path) -> int:
    """When it was written last, in nanoseconds; 0 if another run has just renamed it."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _is_needed(path: Path) -> bool:
    """Whether it may be all that is left of a checkpoint, or another run may be writing it."""
    place = path.with_name(_UNIQUE.sub("", path.name)[1:])
    if path.name.endswith(".old") and not place.exists():
        return True  # killed between two renames
    try:
        newest = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:  # it changes right now
        return True
    return time.time() - newest < _RECENT

"""What killed runs leave of checkpoints that they were writing, replacing or deleting."""

import re
import time
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dsmoe.folders import remove

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


def remove_leftovers(trainer: Trainer) -> None:
    """Delete leftovers from the folders of a run, but for the one that it was resumed from.

    What changed in the last hour stays, and an earlier checkpoint that nothing has replaced.

    Args:
        trainer: has begun to train.
    """
    if not trainer.is_global_zero:
        return
    resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
    for callback in trainer.checkpoint_callbacks:
        dirpath = str(getattr(callback, "dirpath", None) or "")
        if not isinstance(callback, ModelCheckpoint) or not dirpath or "://" in dirpath:
            continue
        for path in leftovers(Path(dirpath).expanduser()):
            if path.resolve() != resumed and not _is_needed(path):
                remove(path)


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

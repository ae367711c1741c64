"""Checkpoint files that are replaced atomically, and checked before they are loaded."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_dsmoe.files import hidden_beside
from lightning_dsmoe.folders import put_in_place, remove
from lightning_dsmoe.serialization.checkpoint import read_any
from lightning_dsmoe.serialization.sharded_folder import META, check_replaceable


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, in the folder that they go to, and loads no damaged ones.

    Lightning 2.6.6 writes to the system's folder of temporary files. If that is on another file
    system, moving the file is copying it, and a run that is killed, or a full disk, leaves a part
    of it under its final name, where the earlier checkpoint was.

    Remote addresses are left to Lightning, but for what is loaded, which is data unless it is
    trusted.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; whatever fails, an earlier file of this name remains.

        Args:
            checkpoint: what to save.
            path: the file.
            storage_options: not supported, as in Lightning.

        Raises:
            FileExistsError: if a folder of something else is there.
            OSError: if the file cannot be written, for instance since the disk is full.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path).expanduser()
        hidden = hidden_beside(place)
        try:
            check_replaceable(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            with hidden.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # else a crash may leave the new name with no content
            put_in_place(hidden, place)
        except (OSError, RuntimeError) as error:
            # torch.save continues after a failed write, and raises another error at its end.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            message = f"no checkpoint was written: {reason.strerror or reason}"
            raise OSError(reason.errno, message, str(place)) from error
        finally:
            hidden.unlink(missing_ok=True)
        sync_folder(place.parent)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint; a folder is renamed first, so that no part of it keeps its name.

        Args:
            path: the file or folder.
        """
        place = Path(path).expanduser()
        if _is_remote(path) or not place.is_dir() or place.is_symlink():
            super().remove_checkpoint(path)
            return
        hidden = hidden_beside(place)
        place.rename(hidden)
        # First, so that a killed process leaves nothing that looks like one about to be renamed.
        remove(hidden / META)
        remove(hidden)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, as data only unless `weights_only` is False.

        Args:
            path: the file, or the folder of a sharded checkpoint.
            map_location: device for the tensors, or what else `torch.load` takes; None for the CPU.
            weights_only: False trusts the file fully; it can run any code then.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, compressed, holds more than data, or is something
                else.
        """
        map_location = "cpu" if map_location is None else map_location
        safe = weights_only is not False
        if _is_remote(path) or not Path(path).expanduser().exists():
            return super().load_checkpoint(path, map_location, weights_only=safe)
        return read_any(
            Path(path).expanduser(), weights_only=safe, map_location=map_location, mmap=False
        )


def _is_remote(path: str | Path) -> bool:
    return any(sign in str(path) for sign in ("://", "::"))


def sync_folder(folder: Path) -> None:
    """Make new names survive a crash of the machine, where the system can sync a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Paths that a checkpoint names, for Lightning to load, replace and delete."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
_SHOWN = 10


def drop_foreign_paths(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Take those paths out of a checkpoint that are no checkpoints of this run.

    `ModelCheckpoint` of Lightning 2.6.6 takes over the paths in a checkpoint that is resumed, and
    deletes what is there when it saves the next, folders with all that is in them. The paths that
    remain end as checkpoints do and lie in the folder of this run or of the resumed checkpoint.

    Args:
        checkpoint: what was loaded; the states of its callbacks are changed.
        trainer: knows the folder of this run and the path of the checkpoint.
    """
    states = checkpoint.get("callbacks")
    for callback in trainer.checkpoint_callbacks:
        state = states.get(callback.state_key) if isinstance(states, dict) else None
        if isinstance(callback, ModelCheckpoint) and isinstance(state, dict):
            _drop(state, callback, trainer.ckpt_path)


def _drop(state: dict[str, Any], callback: ModelCheckpoint, resumed: str | Path | None) -> None:
    folders = [str(callback.dirpath)]
    if resumed is not None:
        folders.append(os.path.dirname(resumed) or ".")
    # Strategies that shard write folders; then these may be among the checkpoints of a run.
    writes_folders = resumed is not None and os.path.isdir(resumed)

    def is_own(path: object) -> bool:
        return (
            isinstance(path, str)
            and path.endswith(callback.FILE_EXTENSION)
            and any(_lies_in(folder, path) for folder in folders)
            and (writes_folders or not os.path.isdir(os.path.expanduser(path)))
        )

    best = state.get("best_k_models")
    best = best if isinstance(best, dict) else {}
    named = [state.get("best_model_path")]
    if state.get("dirpath", callback.dirpath) == callback.dirpath:  # else Lightning drops the rest
        named += [*(state.get(name) for name in _PATHS), *best]
    shown = [repr(path)[:200] for path in named if path and not is_own(path)]
    if foreign := list(dict.fromkeys(shown)):
        rank_zero_warn(
            "paths in the checkpoint that are no checkpoints of this run are not taken over: "
            + ", ".join(foreign[:_SHOWN])
            + (f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else "")
        )
    state["best_k_models"] = {path: score for path, score in best.items() if is_own(path)}
    for name in _PATHS:
        if not is_own(state.get(name)):
            state[name] = ""


def _lies_in(folder: str, path: str) -> bool:
    """Whether a path leads into a folder; at a remote address it has to be written like that."""
    if "://" in folder:
        is_plain = "::" not in path and ".." not in path.split("/")
        return is_plain and path.startswith(folder.rstrip("/") + "/")
    # Lightning compares such paths as they are written, and fsspec follows where they lead.
    if "://" in path or "::" in path or path.startswith(("file:", "local:")):
        return False
    try:
        real, inside = (Path(os.path.realpath(os.path.expanduser(p))) for p in (folder, path))
    except ValueError:  # such as a zero byte
        return False
    return real in inside.parents

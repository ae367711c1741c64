"""What killed runs leave, and who removes it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint import save

from lightning_dsmoe.files import hidden_beside
from lightning_dsmoe.serialization.sharded_folder import META
from lightning_dsmoe.training.checkpoint_io import SafeCheckpointIO
from lightning_dsmoe.training.leftovers import is_written, leftovers, remove_leftovers

HIDDEN = ".last.ckpt." + "0" * 32


class Run:
    """A run as far as leftovers are concerned."""

    def __init__(self, folder: Path, ckpt_path: Path | None = None) -> None:
        self.checkpoint_callbacks = [ModelCheckpoint(folder)]
        self.default_root_dir = str(folder)
        self.is_global_zero, self.ckpt_path = True, ckpt_path


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_run_deletes_them_and_nothing_else(
    make_one_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    file, shards = (hidden_beside(folder / name) for name in ("last.ckpt", "epoch=0-step=4.ckpt"))
    old = file.with_name(f"{hidden_beside(folder / 'mine.ckpt').name}.old")
    file.touch()
    for each in (shards, old):
        each.mkdir()
        (each / "__0_0.distcp").touch()
    for each in (file, *(path for top in (shards, old) for path in (*top.iterdir(), top))):
        os.utime(each, (0, 0))
    unreplaced = f".other.ckpt.{'0' * 32}.old"
    recent = f".last.ckpt.{'0' * 32}"
    theirs = [".last.ckpt.bak", ".notes", ".last.ckpt.0123", f".plan.json.{'0' * 32}", "mine.ckpt"]
    for name in theirs:
        (folder / name).touch()
    assert set(leftovers(folder)) == {file, shards, old}
    for name in (unreplaced, recent):
        (folder / name).touch()
    os.utime(folder / unreplaced, (0, 0))
    theirs += [unreplaced, recent]
    saved = ModelCheckpoint(folder, save_last=True, save_top_k=0)
    trainer = make_trainer(callbacks=[saved], enable_checkpointing=True, max_steps=1)
    trainer.fit(make_one_model(), make_loader(), make_loader())
    assert sorted(path.name for path in folder.iterdir()) == sorted([*theirs, "last.ckpt"])


def write(path: Path, age: int, kind: str = "file") -> Path:
    """A whole checkpoint that is some hours old."""
    state = {"state_dict": {"a": torch.ones(2)}}
    if kind == "file":
        torch.save(state, path)
    else:
        save(state, checkpoint_id=path)
        torch.save({}, path / META)
    when = 10**9 - 3600 * age
    for each in (*path.glob("*"), path):
        os.utime(each, (when, when))
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_only_had_to_be_renamed_stays_until_there_is_something_newer(
    kind: str, tmp_path: Path
) -> None:
    write(tmp_path / "last.ckpt", age=9, kind=kind)
    write(tmp_path / "epoch=0.ckpt", age=8)
    hidden = write(tmp_path / HIDDEN, age=7, kind=kind)
    part = write(tmp_path / (HIDDEN[:-1] + "1"), age=6, kind=kind)
    cut = part if kind == "file" else next(part.glob("*.distcp"))
    cut.write_bytes(cut.read_bytes()[:-30])
    for each in (part, cut):
        os.utime(each, (10**9, 10**9))
    with pytest.warns(UserWarning, match=f"newer than all others there; .*{HIDDEN}$"):
        remove_leftovers(Run(tmp_path))  # type: ignore[arg-type]
    assert is_written(hidden)
    assert not part.exists()
    remove_leftovers(Run(tmp_path, ckpt_path=hidden))  # type: ignore[arg-type]
    assert is_written(hidden)
    write(tmp_path / "epoch=1.ckpt", age=5)
    remove_leftovers(Run(tmp_path))  # type: ignore[arg-type]
    assert not hidden.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_folder_that_was_being_deleted_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "epoch=0.ckpt", age=9, kind="folder")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        SafeCheckpointIO().remove_checkpoint(path)
    [hidden] = leftovers(tmp_path)
    assert not is_written(hidden)

"""What killed runs leave, and who removes it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dsmoe.files import hidden_beside
from lightning_dsmoe.training.leftovers import leftovers


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

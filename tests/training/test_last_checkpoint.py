"""Where `last` leads to."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.checkpoint import save

from lightning_dsmoe.files import hidden_beside
from lightning_dsmoe.training.last_checkpoint import find_last_checkpoint

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(name: str, *, age: int = 0, damaged: bool = False) -> Path:
        """Write a checkpoint that is some seconds old."""
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {}}, path)
        if damaged:
            path.write_bytes(path.read_bytes()[:-30])
        os.utime(path, (10**9 - age, 10**9 - age))
        return path

    return to


@pytest.fixture
def find(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Callable[..., str]:
    def of(*callbacks: Any, **options: Any) -> str:
        """Path below the folder of this test, for a trainer with these callbacks."""
        logger = CSVLogger(tmp_path, name="quickstart")
        trainer = make_trainer(
            **{
                "logger": logger,
                "callbacks": list(callbacks),
                "default_root_dir": tmp_path,
                "enable_checkpointing": True,
                **options,
            }
        )
        return find_last_checkpoint(trainer).removeprefix(f"{tmp_path}/")

    return of


def test_the_newest_of_the_last_version(write: Write, find: Any, tmp_path: Path) -> None:
    folder = "quickstart/version_{}/checkpoints/"
    write(folder.format(9) + "last.ckpt")
    write(folder.format(10) + "epoch=0-step=3.ckpt", age=20)
    write(folder.format(10) + "last.ckpt", age=10)
    write(folder.format(10) + ".tuning.ckpt")
    (tmp_path / folder.format(11)).mkdir(parents=True)
    (tmp_path / "quickstart" / "version_12").mkdir()
    write("other/version_20/checkpoints/last.ckpt")
    assert find() == folder.format(10) + "last.ckpt"
    write(folder.format(10) + "epoch=1-step=6.ckpt")
    assert find() == folder.format(10) + "epoch=1-step=6.ckpt"
    own = CSVLogger(tmp_path, name="quickstart", version=9)
    assert find(logger=own) == folder.format(9) + "last.ckpt"


def test_damaged_ones_are_skipped_by_name(write: Write, find: Any) -> None:
    folder = "quickstart/version_{}/checkpoints/"
    write(folder.format(0) + "last.ckpt", age=30)
    write(folder.format(1) + "last.ckpt", damaged=True)
    best = write(folder.format(1) + "best.ckpt", age=10)
    with pytest.warns(UserWarning, match=r"version_1/checkpoints/last\.ckpt is damaged"):
        assert find() == folder.format(1) + "best.ckpt"
    best.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match=r"version_1/checkpoints/last\.ckpt is damaged"),
        pytest.warns(UserWarning, match=r"version_1/checkpoints/best\.ckpt is damaged"),
    ):
        assert find() == folder.format(0) + "last.ckpt"


def test_folders_that_were_given(write: Write, find: Any, tmp_path: Path) -> None:
    write("quickstart/version_0/checkpoints/last.ckpt")
    given = ModelCheckpoint(tmp_path / "given")
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint for .*given$"):
        find(given)
    write("given/epoch=0.ckpt", age=10)
    write("given/.hidden.ckpt")
    assert find(given) == "given/epoch=0.ckpt"
    write("crashed/on_exception.ckpt")
    assert find(given, OnExceptionCheckpoint(tmp_path / "crashed")) == "crashed/on_exception.ckpt"
    write("checkpoints/last.ckpt")
    assert find(logger=False) == "checkpoints/last.ckpt"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_folder_of_shards_is_complete_with_all_of_its_files(write: Write, find: Any) -> None:
    folder = "quickstart/version_0/checkpoints/"
    whole = write(folder + "whole.ckpt/meta.pt", age=20).parent
    save({"state_dict": {"a": torch.ones(2)}}, checkpoint_id=whole)
    part = write(folder + "part.ckpt/shard.distcp").parent
    with pytest.warns(UserWarning, match=r"part\.ckpt is damaged"):
        assert find() == folder + "whole.ckpt"
    shutil.rmtree(part)
    hidden = whole.rename(whole.with_name(f"{hidden_beside(whole).name}.old"))
    assert find() == folder + hidden.name  # a run was killed before the new one took its place
    next(hidden.glob("*.distcp")).unlink()  # one was killed that deleted it
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        find()


def test_a_file_that_only_had_to_be_renamed_counts(write: Write, find: Any) -> None:
    folder = "quickstart/version_0/checkpoints/"
    place = write(folder + "last.ckpt", age=20)
    hidden = write(folder + hidden_beside(place).name, age=10)
    write(folder + hidden_beside(place).name, damaged=True)  # one was killed while it was written
    assert find() == folder + hidden.name


def test_nothing_to_find(find: Any, tmp_path: Path) -> None:
    for version in range(6):
        (tmp_path / "quickstart" / f"version_{version}" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"version_5/checkpoints, .* and 4 other versions$"):
        find()
    with pytest.raises(FileNotFoundError, match="no ModelCheckpoint is configured"):
        find(enable_checkpointing=False)
    assert find(ModelCheckpoint("memory://run")) == "last"

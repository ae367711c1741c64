"""What is put into the place of something else."""

import os
from pathlib import Path

import pytest

from lightning_dsmoe.folders import put_in_place


def make(path: Path, content: str, *, folder: bool) -> Path:
    if folder:
        path.mkdir()
    (path / "file" if folder else path).write_text(content)
    return path


def content(path: Path) -> str:
    return (path / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("earlier", ["nothing", "file", "folder", "link", "broken link"])
@pytest.mark.parametrize("folder", [False, True])
def test_the_new_one_is_there_and_nothing_else(folder: bool, earlier: str, tmp_path: Path) -> None:
    place, target = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    if earlier in ("file", "folder"):
        make(place, "old", folder=earlier == "folder")
    elif earlier != "nothing":
        place.symlink_to(target)
    if earlier == "link":
        make(target, "best", folder=folder)
    put_in_place(make(tmp_path / ".new", "new", folder=folder), place)
    assert content(place) == "new"
    assert not place.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt"] * (earlier == "link") + ["last.ckpt"]
    if earlier == "link":
        assert content(target) == "best"

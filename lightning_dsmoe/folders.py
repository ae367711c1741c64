"""Folders that are written whole or not at all, and keep what a person has put into them."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_dsmoe.files import hidden_beside


@contextmanager
def replaced_folder(path: Path, *, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a hidden folder beside a path, and rename it to the path if the block succeeds.

    A full disk or a killed process leaves the earlier folder as it was, and at worst the hidden one
    beside it. Files of the earlier folder that are not ours are in the new one too, as hard links
    where the file system has them: a link takes no space and no time for files of gigabytes.

    Args:
        path: the folder's place.
        is_ours: whether a file or folder of this name is written anew, or dropped.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = hidden_beside(path)
    try:
        if path.exists():
            _copy_linked(path, folder, is_ours)
        folder.mkdir(exist_ok=True)
        yield folder
        _replace(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy_linked(path: Path, folder: Path, is_ours: Callable[[str], bool]) -> None:
    def ignore(where: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(where) == path and is_ours(name)]

    shutil.copytree(path, folder, symlinks=True, ignore=ignore, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _replace(folder: Path, path: Path) -> None:
    """Rename a finished folder to its place; an earlier one is deleted when that has succeeded.

    A directory that is not empty cannot be replaced in one step, so the earlier one is renamed
    first. A process killed between the two leaves it whole as `.NAME.….old`.
    """
    if not path.exists():
        folder.rename(path)
        return
    earlier = folder.with_name(f"{folder.name}.old")
    try:
        path.rename(earlier)
        folder.rename(path)
    except BaseException:  # Ctrl-C too
        if earlier.exists() and not path.exists():
            earlier.rename(path)
        raise
    shutil.rmtree(earlier, ignore_errors=True)

"""Folders that are written whole or not at all, and keep what a person has put into them."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_dsmoe.files import hidden_beside, naming


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
    given, path = path, path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = hidden_beside(path)
    try:
        with naming(given, folder):
            if path.exists():
                _copy_linked(path, folder, is_ours)
            folder.mkdir(exist_ok=True)
            yield folder
            put_in_place(folder, path)
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


def put_in_place(new: Path, path: Path) -> None:
    """Rename a finished file or folder to its place; an earlier one is deleted afterwards.

    A file replaces a file in one step. Folders cannot, so an earlier one is renamed first: a
    process killed between the two leaves it whole as `.NAME.….old`. Where a link is replaced, what
    it leads to stays.
    """
    is_folder = path.is_dir() and not path.is_symlink()
    if (new.is_file() and not is_folder) or not os.path.lexists(path):
        new.replace(path)
        return
    earlier = new.with_name(f"{new.name}.old")
    try:
        path.rename(earlier)
        new.rename(path)
    except BaseException:  # Ctrl-C too
        if os.path.lexists(earlier) and not os.path.lexists(path):
            earlier.rename(path)
        raise
    remove(earlier)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it; what cannot be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()

"""Files that are written whole or not at all, and small ones of unknown origin."""

import codecs
import errno
import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from uuid import uuid4

_MAX_JSON_BYTES = 64 * 2**20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""Errors of a write, which Python raises without a name."""
_MARKS = {  # UTF-32 first, since its marks begin with those of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    Renaming within a folder is atomic: a process that is killed leaves the old file or the new.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder, "plan.json")) as temporary:
        ...         _ = temporary.write_text("{}")
        ...     [path.name for path in Path(folder).iterdir()]
        ['plan.json']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_beside(path)
    try:
        with naming(path, temporary):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, temporary: Path) -> Iterator[None]:
    """Let an error of the file system, such as a full disk, name a path rather than its stand-in.

    Args:
        path: the path that a user knows.
        temporary: the file or folder that will replace it.
    """
    try:
        yield
    except OSError as error:
        names = [f"{name}" for name in (error.filename, error.filename2) if name is not None]
        if any(f"{temporary}" in name for name in names) if names else error.errno in _FULL:
            error.filename = f"{path}"
            if error.filename2 is not None:
                del error.filename2  # None would be shown, too
        raise


def hidden_beside(path: Path) -> Path:
    """A new hidden path beside another one, for a file or folder that will replace it."""
    return path.with_name(f".{path.name}.{uuid4().hex}")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_file(output: str, *read: str | None) -> None:
    """Raise a ValueError if the file to write cannot be written, or is one that is read.

    Args:
        output: the file to write.
        read: files that the same command reads.
    """
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"output must be a file, {output or repr('')} is a folder")
    for other in read:
        if other is not None and path.exists() and Path(other).exists() and path.samefile(other):
            raise ValueError(f"output must be another file than {other}, which would be lost")
    check_place(path)


def check_place(path: Path) -> None:
    """Raise a ValueError if no file or folder can be made at a path: before the work, not after.

    Nothing is left behind, folders above it neither.
    """
    first = "".join(path.parts[:1])
    if os.path.expanduser(first) != first:  # whoever deletes a folder "~" loses more
        raise ValueError(
            f"{path} would be a folder here that is called {first}: shells know ~ only at "
            "the beginning of a word, so put a space before it, or write the whole path"
        )
    place = path.absolute()
    folder = next(each for each in (*place.parents, place) if each.exists())
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {folder}: {error.strerror}") from None


def check_mark(path: Path) -> None:
    """Raise a ValueError if a file begins with the byte-order mark of UTF-16 or UTF-32."""
    with path.open("rb") as file:
        head = file.read(4)
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            raise ValueError(
                f"{path} is text in {encoding}, only UTF-8 is read; to convert it: "
                f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
            )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: if it is not JSON or too large.
    """
    check_json_size(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def check_json_size(path: Path) -> None:
    """Raise a ValueError if a JSON file is too large to be read."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_JSON_BYTES} bytes")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A corpus: text files, read in order as one UTF-8 text."""

import codecs
import glob
import re
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO

from lightning_dsmoe.files import check_mark

PIECE_BYTES = 4 * 1024**2
LINE_BYTES = 4 * 1024**2
"""What a piece takes of the line that it ends in: some texts are one line, larger than memory."""
NOT_SOURCES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


@dataclass(frozen=True)
class Corpus:
    """Text files joined in order; a position is a byte offset into the whole.

    Args:
        files: The files, in order.
        sizes: Their sizes in bytes, without byte-order marks.
        marks: The sizes of the byte-order marks that they begin with, 0 or 3.
    """

    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    marks: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return self._ends[-1] if self._ends else 0

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.sizes))

    def boundary(self, position: int) -> int:
        """Return the start of the character that the byte at `position` belongs to.

        Args:
            position: A byte offset from 0 to `size`.
        """
        index = bisect_right(self._ends, position)
        if index == len(self._ends):
            return position
        first = self._ends[index] - self.sizes[index]
        with self.files[index].open("rb") as stream:
            while position > first:
                stream.seek(self.marks[index] + position - first)
                byte = stream.read(1)
                if not byte or byte[0] & 0xC0 != 0x80:
                    break
                position -= 1
        return position

    def read(self, start: int, stop: int) -> Iterator[str]:
        """Yield the text between two character boundaries in pieces of bounded size.

        Pieces end at the end of a line, of a file, at `stop`, or within a line of several MiB.

        Args:
            start: First byte offset.
            stop: One past the last byte offset.

        Raises:
            ValueError: On a NUL byte or invalid UTF-8, naming the file and the byte offset.
        """
        for file, first, last, _ in self._in_files(start, stop):
            with file.open("rb") as stream:
                for begin, end in _pieces(stream, first, last):
                    stream.seek(begin)
                    data = stream.read(end - begin)
                    if len(data) < end - begin:
                        raise ValueError(
                            f"{file} is shorter than it was: it changed while being read"
                        )
                    yield _decode(data, file, begin)

    def piece_ends(self, start: int, stop: int) -> Iterator[int]:
        """Yield where the pieces of `read` end, which reads the lines there and nothing else.

        Args:
            start: First byte offset.
            stop: One past the last byte offset.
        """
        for file, first, last, before in self._in_files(start, stop):
            if last - first <= PIECE_BYTES:  # a corpus of a million small files is not opened
                yield before + last
                continue
            with file.open("rb") as stream:
                for _, end in _pieces(stream, first, last):
                    yield before + end

    def _in_files(self, start: int, stop: int) -> Iterator[tuple[Path, int, int, int]]:
        """Yield files, what to read of each, and what of the corpus is before its first byte."""
        index = bisect_right(self._ends, start)
        while start < stop:
            end = min(stop, self._ends[index])
            before = self._ends[index] - self.sizes[index] - self.marks[index]
            if start < end:
                yield self.files[index], start - before, end - before, before
            start, index = end, index + 1


def find_corpus(files: str | Path | Sequence[str | Path] | None = None) -> Corpus:
    """Resolve paths and globs into a corpus.

    Args:
        files: A path, a glob, or a list of them; `~` is expanded, directories are not searched.
            Files are sorted and each is read once. Without it, the Python sources of the running
            interpreter's standard library.

    Raises:
        ValueError: If a pattern matches no file, a file begins as text in UTF-8 does not, or all
            files are empty.
    """
    if files is None:
        paths = _standard_library()
    else:
        patterns = [files] if isinstance(files, str | Path) else list(files)
        paths = sorted({path for pattern in patterns for path in _matches(str(pattern))})
    if not paths:
        raise ValueError("files must name at least one text file, got none")
    marks = tuple(_mark(path) for path in paths)
    sizes = tuple(path.stat().st_size - mark for path, mark in zip(paths, marks, strict=True))
    if not any(sizes):
        raise ValueError(f"the corpus is empty: 0 bytes in {len(paths)} file(s), {paths[0]}")
    return Corpus(tuple(paths), sizes, marks)


def _matches(pattern: str) -> list[Path]:
    expanded = Path(pattern).expanduser()
    if expanded.is_file():
        return [expanded.resolve()]
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", pattern):
        raise ValueError(
            f"files are read from this machine only, got the address {pattern!r}: download it first"
        )
    if expanded.is_dir():
        raise ValueError(
            f"{pattern!r} is a folder: write which of its files to read, such as "
            f"{str(expanded / '*.txt')!r}, or {str(expanded / '**' / '*')!r} for all of them"
        )
    matches = [Path(name) for name in glob.glob(str(expanded), recursive=True)]
    paths = [path.resolve() for path in matches if path.is_file()]
    if not paths and matches:
        raise ValueError(f"only folders or devices match {pattern!r}, no file")
    if not paths and not glob.has_magic(pattern):
        place = "" if expanded.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(f"there is no file {pattern!r}{place}")
    if not paths:
        raise ValueError(f"no file matches {pattern!r}")
    return paths


def _mark(file: Path) -> int:
    """Return the size of a file's UTF-8 byte-order mark; refuse those of other encodings."""
    check_mark(file)
    with file.open("rb") as stream:
        head = stream.read(5)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(f"{file} is compressed ({name}): unpack it first")
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if path.is_file())
    sources = [path for path in paths if not NOT_SOURCES & set(path.relative_to(root).parts[:-1])]
    if not sources:
        raise ValueError(f"this Python has no library sources in {root}: name your own files")
    return sorted(sources)


def _pieces(stream: IO[bytes], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield where pieces of a file begin and end."""
    while start < stop:
        end = min(start + PIECE_BYTES, stop)
        stream.seek(end)
        line = stream.readline(min(LINE_BYTES, stop - end))
        if end + len(line) < stop and not line.endswith(b"\n"):
            line = _whole_characters(line)
        yield start, end + len(line)
        start = end + len(line)


def _whole_characters(data: bytes) -> bytes:
    """Leave out the last character, which may go on after these bytes."""
    last = next((i for i in range(1, 5) if data[-i] & 0xC0 != 0x80), 0)
    return data[:-last] if 0 < last < len(data) else data


def _decode(data: bytes, file: Path, offset: int) -> str:
    if (nul := data.find(b"\0")) >= 0:
        raise ValueError(f"{file} is not a text file: NUL byte at offset {offset + nul}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not a text file: invalid UTF-8 at byte offset {offset + error.start}"
        ) from error

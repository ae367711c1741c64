"""A corpus: text files read in order as one stretch of UTF-8."""

import glob
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

PIECE_BYTES = 4 * 1024**2
NOT_SOURCES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)


@dataclass(frozen=True)
class Corpus:
    """Text files joined in order; a position is a byte offset into the whole.

    Args:
        files: The files, in order.
        sizes: Their sizes in bytes.
    """

    files: tuple[Path, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)

    def boundary(self, position: int) -> int:
        """Return the start of the character that the byte at `position` belongs to.

        Args:
            position: A byte offset from 0 to `size`.
        """
        ends = list(accumulate(self.sizes))
        index = bisect_right(ends, position)
        if index == len(ends):
            return position
        first = ends[index] - self.sizes[index]
        with self.files[index].open("rb") as stream:
            while position > first:
                stream.seek(position - first)
                byte = stream.read(1)
                if not byte or byte[0] & 0xC0 != 0x80:
                    break
                position -= 1
        return position

    def read(self, start: int, stop: int) -> Iterator[str]:
        """Yield the text between two character boundaries in pieces of bounded size.

        Pieces end at the end of a line, of a file, or at `stop`.

        Args:
            start: First byte offset.
            stop: One past the last byte offset.

        Raises:
            ValueError: On a NUL byte or invalid UTF-8, naming the file and the byte offset.
        """
        offset = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            first, last = max(start - offset, 0), min(stop - offset, size)
            offset += size
            if first < last:
                yield from _read_file(file, first, last)


def find_corpus(files: str | Sequence[str] | None = None) -> Corpus:
    """Resolve paths and globs into a corpus.

    Args:
        files: A path, a glob, or a list of them; `~` is expanded, directories are not searched.
            Files are sorted and each is read once. Without it, the Python sources of the running
            interpreter's standard library.

    Raises:
        ValueError: If a pattern matches no file, or all files are empty.
    """
    if files is None:
        paths = _standard_library()
    else:
        patterns = [files] if isinstance(files, str) else list(files)
        paths = sorted({path for pattern in patterns for path in _matches(pattern)})
    if not paths:
        raise ValueError("files must name at least one text file, got none")
    sizes = tuple(path.stat().st_size for path in paths)
    if not any(sizes):
        raise ValueError(f"the corpus is empty: 0 bytes in {len(paths)} file(s), {paths[0]}")
    return Corpus(tuple(paths), sizes)


def _matches(pattern: str) -> list[Path]:
    expanded = Path(pattern).expanduser()
    if expanded.is_file():
        return [expanded.resolve()]
    found = (Path(name) for name in glob.glob(str(expanded), recursive=True))
    paths = [path.resolve() for path in found if path.is_file()]
    if not paths:
        raise ValueError(f"no file matches {pattern!r}")
    return paths


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if path.is_file())
    sources = [path for path in paths if not NOT_SOURCES & set(path.relative_to(root).parts[:-1])]
    if not sources:
        raise ValueError(f"this Python has no library sources in {root}: name your own files")
    return sorted(sources)


def _read_file(file: Path, start: int, stop: int) -> Iterator[str]:
    with file.open("rb") as stream:
        stream.seek(start)
        while start < stop:
            data = stream.read(min(PIECE_BYTES, stop - start))
            data += stream.readline(stop - start - len(data)) if len(data) < stop - start else b""
            if not data:
                raise ValueError(f"{file} is shorter than it was: it changed while being read")
            yield _decode(data, file, start)
            start += len(data)


def _decode(data: bytes, file: Path, offset: int) -> str:
    if (nul := data.find(b"\0")) >= 0:
        raise ValueError(f"{file} is not a text file: NUL byte at offset {offset + nul}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not a text file: invalid UTF-8 at byte offset {offset + error.start}"
        ) from error

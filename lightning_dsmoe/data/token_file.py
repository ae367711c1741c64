"""A tokenized corpus in one flat file, written once and then memory-mapped."""

import hashlib
import json
import os
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_dsmoe.data.content_digest import SAMPLED_FROM, content_digest
from lightning_dsmoe.data.corpus import Corpus
from lightning_dsmoe.files import atomic_path, write_text
from lightning_dsmoe.tokenizers import CharTokenizer, Tokenizer

FORMAT_VERSION = 2

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class TokenSpan:
    """A range of a token file, sent to worker processes as a path rather than as data.

    Args:
        path: The flat file of token ids.
        dtype: Its element type: "uint8", "uint16" or "uint32".
        start: First token.
        stop: One past the last token.
    """

    def __init__(self, path: Path, dtype: str, start: int, stop: int) -> None:
        self.path, self.dtype, self.start, self.stop = path, dtype, start, stop
        self._tokens: NDArray[np.unsignedinteger] = np.memmap(path, dtype=dtype, mode="r")

    def __reduce__(self) -> tuple[type["TokenSpan"], tuple[Path, str, int, int]]:
        return TokenSpan, (self.path, self.dtype, self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the tokens [stop - start] at offsets into this span, fewer at its end."""
        first, last = self.start + start, min(self.start + stop, self.stop)
        return self._tokens[first:last].astype(np.int64)


@dataclass(frozen=True)
class SplitSize:
    """Size of a split in tokens, bytes and characters."""

    tokens: int
    bytes: int
    characters: int


@dataclass(frozen=True)
class TokenFile:
    """A tokenized corpus: its tokenizer, the size of each split, and where the tokens lie."""

    path: Path
    dtype: str
    tokenizer: Tokenizer
    sizes: dict[Split, SplitSize]

    def span(self, split: Split) -> TokenSpan:
        """Return the tokens of one split."""
        before = SPLITS[: SPLITS.index(split)]
        start = sum(self.sizes[name].tokens for name in before)
        return TokenSpan(self.path, self.dtype, start, start + self.sizes[split].tokens)


def open_token_file(
    corpus: Corpus,
    tokenizer: Tokenizer | None,
    *,
    val_fraction: float,
    test_fraction: float,
    cache_dir: str | Path | None = None,
) -> TokenFile:
    """Open the tokens of a corpus, after tokenizing it unless that was done before.

    The corpus is cut at character boundaries by position, train first, then val, then test, so
    that every split's bytes and characters are counted exactly.

    Args:
        corpus: The text.
        tokenizer: Its tokenizer; None for one token per character of the corpus.
        val_fraction: Share of the bytes in the validation split.
        test_fraction: Share of the bytes in the test split.
        cache_dir: Folder of the token files; default `$XDG_CACHE_HOME/lightning_dsmoe`, or
            `~/.cache/lightning_dsmoe`.

    Raises:
        ValueError: If a file of the corpus is not text.
        OSError: If tokens cannot be written to `cache_dir`.
    """
    try:
        directory = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    except RuntimeError as error:  # there is no home directory
        raise OSError(_cannot_keep(cache_dir or "~/.cache", error)) from error
    # Of a large corpus only samples are hashed. Any other change of a file changes its times: that
    # of its status (ctime) even where a program resets that of its content (mtime).
    stats = [file.stat() for file in corpus.files] if corpus.size > SAMPLED_FROM else []
    identity = {
        "format": FORMAT_VERSION,
        "files": [(str(f), size) for f, size in zip(corpus.files, corpus.sizes, strict=True)],
        "content": content_digest(corpus.files),
        "times": [(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats],
        "tokenizer": "char" if tokenizer is None else tokenizer.fingerprint(),
        "fractions": [val_fraction, test_fraction],
    }
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    path = directory / f"{key}.bin"
    if (cached := _read(path)) is not None:
        return cached
    cuts = [
        0,
        corpus.boundary(int(corpus.size * (1 - val_fraction - test_fraction))),
        corpus.boundary(int(corpus.size * (1 - test_fraction))),
        corpus.size,
    ]
    tokenizer = tokenizer or _char_tokenizer(corpus)
    try:
        return _write(path, corpus, tokenizer, cuts)
    except OSError as error:
        if error.filename is not None and Path(error.filename) in corpus.files:
            raise
        raise OSError(_cannot_keep(directory, error.strerror or error)) from error


def _cannot_keep(directory: str | Path, reason: object) -> str:
    return (
        f"cannot keep the tokens of the text in {directory} ({reason}): name another folder as "
        "cache_dir of the data, or in the environment as XDG_CACHE_HOME"
    )


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/lightning_dsmoe`, or `~/.cache/lightning_dsmoe` if it is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_dsmoe"


def _char_tokenizer(corpus: Corpus) -> CharTokenizer:
    alphabet: set[str] = set()
    for text in corpus.read(0, corpus.size):
        alphabet.update(text)
    return CharTokenizer("".join(alphabet))


def _write(path: Path, corpus: Corpus, tokenizer: Tokenizer, cuts: list[int]) -> TokenFile:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1).name
    sizes: dict[Split, SplitSize] = {}
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        for split, start, stop in zip(SPLITS, cuts[:-1], cuts[1:], strict=True):
            n_tokens = n_characters = 0
            for text in corpus.read(start, stop):
                tokens = tokenizer.encode(text).astype(dtype)
                stream.write(tokens.tobytes())
                n_tokens += len(tokens)
                n_characters += len(text)
            sizes[split] = SplitSize(n_tokens, stop - start, n_characters)
    record = {
        "dtype": dtype,
        "content": _content(path),
        "tokenizer": tokenizer.to_dict(),
        "splits": {split: astuple(size) for split, size in sizes.items()},
    }
    write_text(path.with_suffix(".json"), json.dumps(record))
    return TokenFile(path, dtype, tokenizer, sizes)


def _read(path: Path) -> TokenFile | None:
    """Return the token file, or None if it is missing, incomplete or damaged."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        dtype = record["dtype"]
        sizes = {split: SplitSize(*record["splits"][split]) for split in SPLITS}
        tokenizer = Tokenizer.from_dict(record["tokenizer"])
        n_bytes = sum(size.tokens for size in sizes.values()) * np.dtype(dtype).itemsize
        complete = (
            dtype in ("uint8", "uint16", "uint32")
            and path.stat().st_size == n_bytes
            and record["content"] == _content(path)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return TokenFile(path, dtype, tokenizer, sizes) if complete else None


def _content(path: Path) -> list[str | int]:
    """What changes with a token file: hash of samples, and the time of a large one."""
    stat = path.stat()
    return [content_digest([path]), stat.st_mtime_ns if stat.st_size > SAMPLED_FROM else 0]

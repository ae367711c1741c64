"""A tokenized text in a folder of flat files, written once and then memory-mapped.

`tokens.json` tells the tokenizer and the size of each file; ids lie in `train-00000.bin` and so on,
little-endian, in the smallest of three types that holds the vocabulary.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dsmoe.data.content_digest import content_digest
from lightning_dsmoe.files import read_json
from lightning_dsmoe.reading import Bounds, Count, check_json, check_version
from lightning_dsmoe.tokenizers import Tokenizer

FORMAT_VERSION = 3
INDEX = "tokens.json"

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_Fraction = Annotated[float, Bounds(0, 1)]
_Shards = Annotated[list[tuple[Count, Count, Count]], Bounds(0, 10**6)]
_KIND = {
    "format_version": int,
    "dtype": Literal["uint8", "uint16", "uint32"],
    "tokenizer": dict,
    "fractions": tuple[_Fraction, _Fraction],
    "content": str,
    "shards": dict.fromkeys(SPLITS, _Shards),
}


class SplitSize(NamedTuple):
    """Size of a split, or of a part of it, in tokens, bytes and characters."""

    tokens: int
    bytes: int
    characters: int


class TokenSpan:
    """Tokens of several files as one, sent to worker processes as paths rather than as data.

    Args:
        files: The flat files of token ids, in order, each with its number of tokens.
        dtype: Their element type: "uint8", "uint16" or "uint32".
        vocab_size: One more than the largest id.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], dtype: str, vocab_size: int) -> None:
        self.files, self.dtype, self.vocab_size = list(files), dtype, vocab_size
        kind = np.dtype(dtype).newbyteorder("<")
        # An empty file cannot be mapped.
        self._tokens: list[NDArray[np.unsignedinteger]] = [
            np.memmap(path, kind, "r", shape=(n,)) if n else np.empty(0, kind) for path, n in files
        ]
        self._ends = list(accumulate(n for _, n in files))

    def __reduce__(self) -> tuple[type["TokenSpan"], tuple[list[tuple[Path, int]], str, int]]:
        return TokenSpan, (self.files, self.dtype, self.vocab_size)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the tokens [stop - start] at offsets into this span, fewer at its end.

        Args:
            start: First token.
            stop: One past the last token.

        Raises:
            ValueError: If an id is not of the vocabulary, naming the file: a model would read
                beyond its embeddings.
        """
        pieces = [np.empty(0, np.int64)]
        index = bisect_right(self._ends, start)
        while start < min(stop, len(self)):
            first = self._ends[index] - len(self._tokens[index])
            piece = self._tokens[index][start - first : stop - first].astype(np.int64)
            if len(piece) and (largest := piece.max()) >= self.vocab_size:
                raise ValueError(
                    f"{self.files[index][0]} holds the token id {largest}, but the vocabulary ends "
                    f"at {self.vocab_size - 1}: the file is damaged, or not of this tokenizer"
                )
            pieces.append(piece)
            start, index = self._ends[index], index + 1
        return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)


class TokenFile(NamedTuple):
    """A tokenized text: where it lies, its tokenizer, its shares of val and test, its files."""

    folder: Path
    dtype: str
    tokenizer: Tokenizer
    fractions: tuple[float, float]
    shards: dict[Split, list[SplitSize]]

    @property
    def sizes(self) -> dict[Split, SplitSize]:
        """Size of each split."""
        return {
            split: SplitSize(*(sum(column) for column in zip((0, 0, 0), *shards, strict=True)))
            for split, shards in self.shards.items()
        }

    def paths(self, split: Split) -> list[Path]:
        """Return the files of a split, in order."""
        return shard_paths(self.folder, split, len(self.shards[split]))

    def span(self, split: Split) -> TokenSpan:
        """Return the tokens of a split."""
        sizes = [shard.tokens for shard in self.shards[split]]
        files = list(zip(self.paths(split), sizes, strict=True))
        return TokenSpan(files, self.dtype, self.tokenizer.vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """Return what `tokens.json` holds, which `read_tokens` reads."""
        return {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer.to_dict(),
            "fractions": self.fractions,
            # Of all files together, since a digest of large ones reads 16 MiB at most.
            "content": content_digest([path for split in SPLITS for path in self.paths(split)]),
            "shards": self.shards,
        }


def shard_paths(folder: Path, split: Split, n: int) -> list[Path]:
    """Return where the files of a split lie.

    Args:
        folder: The folder of the tokens.
        split: "train", "val" or "test".
        n: Number of files.
    """
    return [folder / f"{split}-{number:05d}.bin" for number in range(n)]


def read_tokens(folder: Path) -> TokenFile:
    """Open a folder of tokens.

    Args:
        folder: The folder.

    Raises:
        ValueError: If it is damaged, incomplete, or in the format of another version.
        OSError: If a file is missing or cannot be read.
    """
    name = str(folder / INDEX)
    state = read_json(folder / INDEX)
    check_version(name, state, FORMAT_VERSION)
    known = check_json(name, state, _KIND)
    val_fraction, test_fraction = known["fractions"]
    shards = {split: [SplitSize(*size) for size in known["shards"][split]] for split in SPLITS}
    tokenizer = Tokenizer.from_dict(known["tokenizer"])
    tokens = TokenFile(folder, known["dtype"], tokenizer, (val_fraction, test_fraction), shards)
    itemsize = np.dtype(tokens.dtype).itemsize
    files = [path for split in SPLITS for path in tokens.paths(split)]
    sizes = [size.tokens * itemsize for split in SPLITS for size in shards[split]]
    for path, size in zip(files, sizes, strict=True):
        if (found := path.stat().st_size) != size:
            raise ValueError(f"{path} is damaged: it has {found} bytes, not {size}")
    if content_digest(files) != known["content"]:
        raise ValueError(f"the tokens in {folder} are damaged: their content is not {name}'s")
    return tokens


def find_tokens(files: object) -> Path | None:
    """Return the folder of tokens that `files` names, None if that is something else.

    Args:
        files: A path, or anything else.
    """
    folder = Path(files).expanduser() if isinstance(files, str | Path) else None
    return folder if folder is not None and (folder / INDEX).is_file() else None


def check_options(
    tokens: TokenFile, tokenizer: Tokenizer | None, fractions: tuple[float, float]
) -> None:
    """Refuse tokens that were made with other options.

    Args:
        tokens: The tokens.
        tokenizer: The tokenizer that is asked for; None for one token per character.
        fractions: Shares of the validation and test splits that are asked for.

    Raises:
        ValueError: If they differ, with every difference.
    """
    made = tokens.tokenizer.to_dict()["kind"]
    asked = "char" if tokenizer is None else tokenizer.to_dict()["kind"]
    differences = []
    if made != asked:
        differences.append(f"tokenizer was {made}, is {asked}")
    elif tokenizer is not None and tokenizer.fingerprint() != tokens.tokenizer.fingerprint():
        differences.append(f"tokenizer was another one of kind {made}")
    names = ("val_fraction", "test_fraction")
    for name, before, now in zip(names, tokens.fractions, fractions, strict=True):
        if before != now:
            differences.append(f"{name} was {before}, is {now}")
    if differences:
        raise ValueError(
            f"the tokens in {tokens.folder} were made with other options: {'; '.join(differences)}"
        )

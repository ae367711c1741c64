"""Tokenizes a text in parts, by several processes; each part is kept when it is finished."""

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from lightning_dsmoe.data.content_digest import SAMPLED_FROM, content_digest
from lightning_dsmoe.data.corpus import Corpus
from lightning_dsmoe.data.token_file import SPLITS, Split, SplitSize, TokenFile, shard_paths
from lightning_dsmoe.files import hidden_beside, read_json, write_text
from lightning_dsmoe.tokenizers import Tokenizer

SHARD_BYTES = 64 * 1024**2
"""Text of a file of tokens: what a killed process has to do again, half a minute at 2 MB/s."""
MOST_SHARDS = 256
"""Files of larger ones for more text: a mapped file stays open, and 1,024 is a usual limit."""


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer,
    fractions: tuple[float, float],
    folder: Path,
    num_workers: int,
) -> TokenFile:
    """Tokenize a text into files of a folder, except for those that are finished already.

    Args:
        corpus: The text.
        tokenizer: Its tokenizer.
        fractions: Shares of the bytes in the validation and test splits.
        folder: The folder.
        num_workers: Processes that tokenize; with 0, this one.

    Raises:
        ValueError: If a file of the corpus is not text.
        OSError: If a file cannot be read or written.
    """
    val, test = fractions
    # In this order: checkpoints and certificates know splits to the token, and sums are rounded.
    first_val, first_test = int(corpus.size * (1 - val - test)), int(corpus.size * (1 - test))
    cuts = [0, corpus.boundary(first_val), corpus.boundary(first_test), corpus.size]
    step = max(SHARD_BYTES, -(-corpus.size // MOST_SHARDS))
    parts: list[_Part] = []
    n_shards: dict[Split, int] = {}
    for split, start, stop in zip(SPLITS, cuts[:-1], cuts[1:], strict=True):
        edges = _edges(corpus, start, stop, step)
        n_shards[split] = len(edges) - 1
        paths = shard_paths(folder, split, n_shards[split])
        parts += map(_Part, paths, edges[:-1], edges[1:])
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1).name
    if len(parts) > len(SPLITS):
        from lightning.pytorch.utilities import rank_zero_info  # takes seconds to import

        rank_zero_info(
            f"tokenizing {corpus.size / 1e9:.2f} GB of text in {len(parts)} parts into {folder}; "
            "parts that are finished are kept if this is stopped"
        )
    sizes = _make(_Parts(corpus, tokenizer, dtype, parts), num_workers)
    _remove_leftovers(folder)
    shards = {split: [sizes.pop(0) for _ in range(n)] for split, n in n_shards.items()}
    return TokenFile(folder, dtype, tokenizer, fractions, shards)


def _edges(corpus: Corpus, start: int, stop: int, step: int) -> list[int]:
    """Where parts begin and end: where pieces do, so that tokens are the same in any parts.

    A tokenizer sees one piece at a time. Cut elsewhere, words at the edge would have other tokens
    than before there were parts, and runs of that time could not be resumed.
    """
    edges = [start]
    for end in corpus.piece_ends(start, stop):
        if end - edges[-1] >= step or end == stop:
            edges.append(end)
    return edges


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left; what another machine writes now is younger than a day."""
    for path in folder.glob(".*.bin.*"):
        with suppress(OSError):  # it may be gone; the tokens are complete anyway
            if time.time() - path.stat().st_mtime > 24 * 60 * 60:
                path.unlink()


def written_since(record: Path, files: list[Path]) -> bool:
    """Whether large files were written to after their record was; samples of them may miss it."""
    stats = [file.stat() for file in files]
    last = max(stat.st_mtime_ns for stat in stats)
    return sum(stat.st_size for stat in stats) > SAMPLED_FROM and last > record.stat().st_mtime_ns


@dataclass(frozen=True)
class _Part:
    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class _Parts(Dataset[Any]):
    """Parts of a corpus, each of which is written when it is read as an item."""

    corpus: Corpus
    tokenizer: Tokenizer
    dtype: str
    parts: list[_Part]

    def __getitem__(self, index: int) -> tuple[int, SplitSize | Exception]:
        part = self.parts[index]
        try:
            part.path.parent.mkdir(parents=True, exist_ok=True)
            return index, self._finished(part) or self._write(part)
        except (OSError, ValueError) as error:  # a loader would wrap it in a page of text
            return index, error

    def __len__(self) -> int:
        return len(self.parts)

    def _finished(self, part: _Part) -> SplitSize | None:
        """Return the size of a part that was finished before, by this process or another."""
        try:
            path = part.path.with_suffix(".json")
            record = read_json(path)
            if record["content"] != content_digest([part.path]) or written_since(path, [part.path]):
                return None
            size = SplitSize(*record["size"])
            return size if size.bytes == part.stop - part.start else None  # cut as it is now
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, part: _Part) -> SplitSize:
        kind = np.dtype(self.dtype).newbyteorder("<")
        n_tokens = n_characters = 0
        temporary = hidden_beside(part.path)
        try:
            with temporary.open("wb") as stream:
                for text in self.corpus.read(part.start, part.stop):
                    tokens = self._encode(text)
                    stream.write(tokens.astype(kind).tobytes())
                    n_tokens += len(tokens)
                    n_characters += len(text)
                stream.flush()
                # Samples of a digest may miss the end of a file that a power failure cut off.
                os.fsync(stream.fileno())
            size = SplitSize(n_tokens, part.stop - part.start, n_characters)
            record = {"size": size, "content": content_digest([temporary])}
            # Another machine may map the same part already, if it was faster: over a network a
            # mapped file must not be replaced.
            if self._finished(part) is None:
                temporary.replace(part.path)
                write_text(part.path.with_suffix(".json"), json.dumps(record))
        finally:
            temporary.unlink(missing_ok=True)
        return size

    def _encode(self, text: str) -> NDArray[np.int64]:
        tokens = self.tokenizer.encode(text)
        if len(tokens) and (largest := tokens.max()) >= self.tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer made the id {largest} of a text, but its vocab_size is "
                f"{self.tokenizer.vocab_size}"
            )
        return tokens


def _make(parts: _Parts, num_workers: int) -> list[SplitSize]:
    # Many parts in random order, so that machines which share the folder share the work too.
    order = torch.Generator()
    order.seed()
    loader = DataLoader(
        parts,
        batch_size=None,
        shuffle=len(parts) > len(SPLITS),
        num_workers=min(num_workers, len(parts)),
        collate_fn=_as_it_is,
        generator=order,
    )
    sizes: dict[int, SplitSize] = {}
    for index, size in loader:
        if isinstance(size, Exception):
            raise size
        sizes[index] = size
    return [sizes[index] for index in range(len(parts))]


def _as_it_is(item: Any) -> Any:
    return item

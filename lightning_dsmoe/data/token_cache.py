"""Tokens of texts, kept in a folder under what they were made from."""

import hashlib
import json
import os
from pathlib import Path

from lightning_dsmoe.data.content_digest import SAMPLED_FROM, content_digest
from lightning_dsmoe.data.corpus import Corpus
from lightning_dsmoe.data.token_file import FORMAT_VERSION, INDEX, SPLITS, TokenFile, read_tokens
from lightning_dsmoe.data.tokenizing import tokenize, written_since
from lightning_dsmoe.files import write_text
from lightning_dsmoe.tokenizers import CharTokenizer, Tokenizer


def open_token_file(
    corpus: Corpus,
    tokenizer: Tokenizer | None,
    *,
    val_fraction: float,
    test_fraction: float,
    cache_dir: str | Path | None = None,
    num_workers: int = 0,
) -> TokenFile:
    """Open the tokens of a corpus, after tokenizing it unless that was done before.

    The corpus is cut at character boundaries by position, train first, then val, then test, so
    that every split's bytes and characters are counted exactly.

    Args:
        corpus: The text.
        tokenizer: Its tokenizer; None for one token per character of the corpus.
        val_fraction: Share of the bytes in the validation split.
        test_fraction: Share of the bytes in the test split.
        cache_dir: Folder of the tokenized texts; default `$XDG_CACHE_HOME/lightning_dsmoe`, or
            `~/.cache/lightning_dsmoe`. Processes, also of several machines, may share it.
        num_workers: Processes that tokenize; with 0, this one.

    Raises:
        ValueError: If a file of the corpus is not text, or changes meanwhile.
        OSError: If tokens cannot be written to `cache_dir`.
    """
    try:
        directory = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    except RuntimeError as error:  # there is no home directory
        raise OSError(_cannot_keep(cache_dir or "~/.cache", error)) from error
    # Of a large corpus only samples are hashed. Any other change of a file changes its times: that
    # of its status (ctime) even where a program resets that of its content (mtime).
    times = _times(corpus)
    identity = {
        "format": FORMAT_VERSION,
        "files": [(str(f), size) for f, size in zip(corpus.files, corpus.sizes, strict=True)],
        "content": content_digest(corpus.files),
        "times": times if corpus.size > SAMPLED_FROM else [],
        "tokenizer": "char" if tokenizer is None else tokenizer.fingerprint(),
        "fractions": [val_fraction, test_fraction],
    }
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    folder = directory / key
    if (cached := _cached(folder)) is not None:
        return cached
    fractions = val_fraction, test_fraction
    try:
        tokenizer = tokenizer or _char_tokenizer(corpus)
        tokens = tokenize(corpus, tokenizer, fractions, folder, num_workers)
        for file, before, after in zip(corpus.files, times, _times(corpus), strict=True):
            if before != after:
                raise ValueError(f"{file} changed while it was tokenized: start again")
        write_text(folder / INDEX, json.dumps(tokens.to_dict()))
    except OSError as error:
        if error.filename is not None and Path(error.filename) in corpus.files:
            raise
        raise OSError(_cannot_keep(directory, error.strerror or error)) from error
    return tokens


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/lightning_dsmoe`, or `~/.cache/lightning_dsmoe` if it is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_dsmoe"


def _cannot_keep(directory: str | Path, reason: object) -> str:
    return (
        f"cannot keep the tokens of the text in {directory} ({reason}): name another folder as "
        "cache_dir of the data, or in the environment as XDG_CACHE_HOME"
    )


def _times(corpus: Corpus) -> list[tuple[int, int]]:
    stats = [file.stat() for file in corpus.files]
    return [(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]


def _cached(folder: Path) -> TokenFile | None:
    """Return the tokens, or None if they are missing, incomplete or damaged."""
    try:
        tokens = read_tokens(folder)
        files = [path for split in SPLITS for path in tokens.paths(split)]
        return None if written_since(folder / INDEX, files) else tokens
    except (OSError, ValueError):
        return None


def _char_tokenizer(corpus: Corpus) -> CharTokenizer:
    alphabet: set[str] = set()
    for text in corpus.read(0, corpus.size):
        alphabet.update(text)
    return CharTokenizer("".join(alphabet))

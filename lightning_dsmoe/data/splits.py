"""Text files as tokens in splits, for a data module and for whoever only reads one split."""

from pathlib import Path

from lightning_dsmoe.data.corpus import find_corpus
from lightning_dsmoe.data.token_cache import open_token_file
from lightning_dsmoe.data.token_file import (
    Split,
    TokenFile,
    check_options,
    find_tokens,
    read_tokens,
)
from lightning_dsmoe.tokenizers import Tokenizer


def open_splits(
    files: str | list[str] | Path | list[Path] | None,
    tokenizer: Tokenizer | None,
    *,
    val_fraction: float,
    test_fraction: float,
    cache_dir: str | None = None,
    num_workers: int = 0,
) -> TokenFile:
    """Open the tokens of text files, which are made first if need be, or of a folder of tokens.

    Args:
        files: A path, a glob, a list of them or a folder of tokens; None for the Python sources of
            the standard library.
        tokenizer: That of the tokens; None for one token per character of the text.
        val_fraction: Share of the text in the validation split.
        test_fraction: Share of the text in the test split.
        cache_dir: Folder of the tokenized text; by default in the user's cache.
        num_workers: Processes that tokenize; with 0, this one.

    Raises:
        ValueError: If the text is missing, empty or not text, or a folder holds other tokens.
    """
    if (folder := find_tokens(files)) is not None:
        tokens = read_tokens(folder)
        check_options(tokens, tokenizer, (val_fraction, test_fraction))
        return tokens
    return open_token_file(
        find_corpus(files),
        tokenizer,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        cache_dir=cache_dir,
        num_workers=num_workers,
    )


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise a ValueError if the shares of the splits leave no text for one of them."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    if not 0 <= test_fraction < 1 - val_fraction:
        raise ValueError(
            f"test_fraction must be at least 0 and leave text for training beside "
            f"val_fraction={val_fraction}, got {test_fraction}"
        )


def check_length(tokens: TokenFile, split: Split, context: int) -> None:
    """Raise a ValueError if a split is too short for one window and the token after it."""
    if (n_tokens := tokens.sizes[split].tokens) <= context:
        raise ValueError(
            f"the {split} split has {n_tokens} tokens, but context={context} needs at least "
            f"{context + 1}: use more text or a smaller context"
        )

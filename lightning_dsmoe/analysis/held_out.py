"""Held-out text to measure a trained model on.

Shapes: B windows (sequences) in a batch, T positions.
"""

import hashlib
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dsmoe.data.splits import check_fractions, check_length, open_splits
from lightning_dsmoe.data.windows import IGNORED, EvaluationWindows
from lightning_dsmoe.tokenizers import Tokenizer


class HeldOut(NamedTuple):
    """Windows of held-out text in batches.

    Args:
        batches: inputs and labels, int64 `[B, T]`; labels of -100 do not count.
        n_tokens: labels that count.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.analysis import HeldOut
        >>> tokens = torch.arange(24).view(4, 6)
        >>> text = HeldOut([(tokens, tokens + 1)], n_tokens=24)
        >>> first, second = text.halves()
        >>> first.n_tokens, second.batches[0][0].shape
        (12, torch.Size([2, 6]))
        >>> len(text.in_batches_of(12).batches)
        2
    """

    batches: list[tuple[Tensor, Tensor]]
    n_tokens: int

    def halves(self) -> "tuple[HeldOut, HeldOut]":
        """The first and the second half of the batches, or of the windows of a single batch.

        Raises:
            ValueError: if there is only one window.
        """
        batches = self.batches
        if len(batches) == 1:
            n_windows, context = batches[0][0].shape
            batches = self.in_batches_of(-(-n_windows // 2) * context).batches
        if len(batches) < 2:
            raise ValueError(
                f"the text has {self.n_tokens} tokens in one window, which is too short to find a "
                f"plan on and to judge it: more than {batches[0][0].numel()} are needed"
            )
        middle = len(batches) // 2
        return _counted(batches[:middle]), _counted(batches[middle:])

    def in_batches_of(self, n_tokens: int) -> "HeldOut":
        """The same windows in batches of at most `n_tokens`, but at least one window each."""
        first_BT, _ = self.batches[0]
        windows = max(1, n_tokens // first_BT.shape[1])
        batches = [
            batch
            for inputs_BT, labels_BT in self.batches
            for batch in zip(inputs_BT.split(windows), labels_BT.split(windows), strict=True)
        ]
        return HeldOut(batches, self.n_tokens)

    @property
    def device(self) -> torch.device:
        """The device of the windows."""
        return self.batches[0][0].device

    def to(self, device: torch.device) -> "HeldOut":
        """The same text on a device."""
        batches = [(inputs.to(device), labels.to(device)) for inputs, labels in self.batches]
        return HeldOut(batches, self.n_tokens)

    def fingerprint(self) -> str:
        """A hash of all tokens and of the length of the windows."""
        # The same tokens in windows of another length give another loss.
        digest = hashlib.sha256(f"{self.batches[0][0].shape[1]} tokens".encode())
        for inputs_BT, labels_BT in self.batches:
            digest.update(np.ascontiguousarray(inputs_BT.cpu().numpy()).tobytes())
            digest.update(np.ascontiguousarray(labels_BT.cpu().numpy()).tobytes())
        return digest.hexdigest()


def held_out(
    tokenizer: Tokenizer,
    files: str | list[str] | None = None,
    *,
    context: int = 128,
    split: Literal["val", "test"] = "val",
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    max_tokens: int = 100_000,
    batch_tokens: int = 2048,
) -> HeldOut:
    """Read windows of a split of text files.

    Args:
        tokenizer: that of the model.
        files: a path, a glob, or a list of them; None takes the Python sources of the standard
            library.
        context: length of a window in tokens.
        split: "val" or "test".
        val_fraction: share of the text in the validation split.
        test_fraction: share of the text in the test split.
        max_tokens: most tokens, rounded up to whole windows, or to whole batches if there are more.
        batch_tokens: batch size in tokens.

    Returns:
        The windows of the split, in order.

    Raises:
        ValueError: if the text is missing or shorter than a window, there is no test split, or a
            number of tokens is less than 1.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_dsmoe.analysis.held_out import held_out
        >>> from lightning_dsmoe.tokenizers import ByteTokenizer
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "text.txt")
        ...     _ = path.write_text("to be or not to be, " * 50)
        ...     text = held_out(ByteTokenizer(), str(path), context=16, val_fraction=0.2)
        >>> text.n_tokens, text.batches[0][0].shape
        (199, torch.Size([13, 16]))
    """
    numbers = {"context": context, "max_tokens": max_tokens, "batch_tokens": batch_tokens}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if split == "test" and not test_fraction:
        raise ValueError("split=test needs a test_fraction above 0, the size of that split")
    check_fractions(val_fraction, test_fraction)
    # Without a data module: Lightning takes seconds to import.
    tokens = open_splits(files, tokenizer, val_fraction=val_fraction, test_fraction=test_fraction)
    check_length(tokens, split, context)
    windows = EvaluationWindows(tokens.span(split), context)
    # No more windows in a batch than are asked for, since whole batches are read.
    size = max(1, min(batch_tokens // context, -(-max_tokens // context)))
    batches, n_tokens = [], 0
    # A loader draws a seed: without its own generator, one of the caller's random numbers.
    for batch in DataLoader(windows, batch_size=size, generator=torch.Generator()):
        if n_tokens >= max_tokens:
            break
        batches.append((batch["input_ids"], batch["labels"]))
        n_tokens += int((batch["labels"] != IGNORED).sum())
    return HeldOut(batches, n_tokens)


def _counted(batches: list[tuple[Tensor, Tensor]]) -> HeldOut:
    return HeldOut(batches, sum(int((labels != IGNORED).sum()) for _, labels in batches))

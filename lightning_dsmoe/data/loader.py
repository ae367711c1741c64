"""A training loader that resumes in the middle of an epoch.

Shapes: B sequences, T positions.
"""

from collections.abc import Iterator
from typing import Any

from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dsmoe.data.windows import TrainingSampler

Batch = dict[str, Tensor]


class ResumableLoader(DataLoader[Batch]):
    """Counts the epochs, batches and windows that it yields, and starts at any of them.

    Each iteration is an epoch of its own. Epochs are counted here rather than taken from the
    Trainer, which counts a run that `max_steps` stopped inside an epoch as a finished epoch.
    """

    epoch = 0
    batches = 0
    windows = 0
    started = False

    def resume(self, epoch: int, batches: int, windows: int) -> None:
        """Let the next iteration begin inside an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            batches: Batches of that epoch that count as read.
            windows: Windows of that epoch, of all ranks together, to skip.
        """
        self.epoch, self.batches, self.windows, self.started = epoch, batches, windows, False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # counts what it passes on
        # Nothing runs before the first `next`, so iterators that are made and dropped cost nothing.
        if self.started:
            self.epoch, self.batches, self.windows = self.epoch + 1, 0, 0
        self.started = True
        ranks = 1
        if isinstance(self.sampler, TrainingSampler):
            self.sampler.set_epoch(self.epoch)
            self.sampler.start, ranks = self.windows, self.sampler.num_replicas
        for batch in super().__iter__():
            self.batches += 1
            self.windows += ranks * batch_size(batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module keeps the position; this marks the loader resumable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, for the same reason."""


def unfinished_batches(trainer: Trainer | None) -> int:
    """Training batches that were begun and not finished: 1 after an interruption, else 0."""
    if trainer is None or trainer.state.fn != "fit" or trainer.fit_loop.epoch_loop.restarting:
        return 0
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.ready - progress.processed)


def batch_size(batch: Batch) -> int:
    """Number of sequences B in a batch, for Lightning's ThroughputMonitor.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.data import batch_size
        >>> batch_size({"input_ids": torch.zeros(2, 8)})
        2
    """
    return batch["input_ids"].shape[0]


def batch_tokens(batch: Batch) -> int:
    """Number of tokens B·T in a batch, for Lightning's ThroughputMonitor.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.data import batch_tokens
        >>> batch_tokens({"input_ids": torch.zeros(2, 8)})
        16
    """
    return batch["input_ids"].numel()

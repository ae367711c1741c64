"""Where in an epoch a run goes on, on as many ranks and with as large batches as it has now."""

from typing import Any, NamedTuple

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_dsmoe.data.loader import ResumableLoader


class Share(NamedTuple):
    """How windows are dealt out at each step."""

    ranks: int
    batch_size: int

    @property
    def windows(self) -> int:
        """Windows that all ranks read together in a step."""
        return self.ranks * self.batch_size

    def __str__(self) -> str:
        return f"{self.ranks} rank(s) x batch_size {self.batch_size} = {self.windows}"


class Position(NamedTuple):
    """What of which epoch was read: batches as the Trainer counts them, windows of all ranks."""

    epoch: int
    batches: int
    windows: int


def move(position: Position, n_windows: int, share: Share, limit: int, accumulate: int) -> Position:
    """Return the position for another share, so that the epoch ends with its last full batch.

    The next step goes on with the first window that was not read. Where fewer than a full step are
    left, the last of those that were read come again. Batches are counted from the end of the
    epoch, since that is where the Trainer validates and counts epochs.

    Args:
        position: The position, inside an epoch.
        n_windows: Windows of an epoch.
        share: How windows are dealt out from now on.
        limit: Batches of an epoch.
        accumulate: Batches of an optimizer step, which begins with this position.

    Examples:
        >>> move(Position(0, 10, 40), 100, Share(2, 4), limit=12, accumulate=1)
        Position(epoch=0, batches=5, windows=40)
    """
    windows = min(position.windows, max(n_windows - share.windows, 0))
    to_come = max(1, (n_windows - windows) // share.windows)
    read = max(limit - to_come, windows // share.windows)
    # A step of the optimizer ends where the count is a multiple, or with the epoch.
    whole = -(-read // accumulate) * accumulate
    return Position(position.epoch, min(whole if whole < limit else read, limit - 1), windows)


def tell_change(position: Position, old: Share, new: Share) -> None:
    """Log that a run goes on with another share; warn where a step has more or fewer windows.

    Args:
        position: Where it goes on.
        old: The share of the checkpoint.
        new: The share of this run.
    """
    line = (
        f"windows of a step: {old} in the checkpoint, {new} now; training goes on with window "
        f"{position.windows} of epoch {position.epoch}"
    )
    if old.windows == new.windows:
        rank_zero_info(line)
        return
    rank_zero_warn(
        f"{line}. The Trainer's accumulate_grad_batches multiplies them: unless it makes up for "
        f"the factor of {new.windows / old.windows:g}, an optimizer step means something else now"
    )


class MovedPosition(Callback):
    """Lets the Trainer count the batches of the first epoch as its loader does after a change.

    The Trainer restores a number of batches, which were of another size, and so would end the
    epoch too early or too late. Its loops are restored after the data; training starts after both.

    Args:
        loader: The training loader.
        position: Where it goes on, still to be moved.
        n_windows: Windows of an epoch.
        share: How windows are dealt out from now on.
    """

    def __init__(
        self, loader: ResumableLoader, position: Position, n_windows: int, share: Share
    ) -> None:
        self.loader: ResumableLoader | None = loader
        self.position, self.n_windows, self.share = position, n_windows, share

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the progress of the epoch, once."""
        if self.loader is None:
            return
        limit, accumulate = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        read = limit if progress.processed else 0
        if self.position.windows:
            moved = move(self.position, self.n_windows, self.share, limit, accumulate)
            self.loader.resume(*moved)
            read = moved.batches
        # What was begun and not ended by the time of the checkpoint stays so.
        shift = read - progress.processed
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress, name, getattr(progress, name) + shift)
        self.loader = None

"""What a run of a `ResumableModule` needs beside its steps, which no subclass can lose."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from lightning import Callback, Trainer

from lightning_dsmoe.training import checkpoints, optimization
from lightning_dsmoe.training.evaluation_loss import EvaluationLoss
from lightning_dsmoe.training.leftovers import remove_leftovers
from lightning_dsmoe.training.same_batches import check_same_batches

_MARK = "_beside_resumption"
"""Attribute of a `configure_callbacks` that gives a `Resumption`."""


def _for_its_module(hook: Callable[..., None]) -> Callable[..., None]:
    """Let a hook run for one module alone: a Trainer keeps its callbacks for the next."""

    @wraps(hook)
    def run(self: "Resumption", trainer: Trainer, pl_module: Any, *args: Any, **named: Any) -> None:
        if pl_module is self.module:
            hook(self, trainer, pl_module, *args, **named)

    return run


class Resumption(Callback):
    """Saves and restores what a run goes on with, and logs the losses of whole splits.

    Hooks of a LightningModule that are overridden are gone, and nobody expects to call those of the
    base, which are empty in Lightning: with them a run would have lost, without a word, its random
    states or the settings of its optimizer. Those of a callback run besides, before them.

    What it saves has its place at the top of a checkpoint, where earlier versions read it.

    Args:
        module: a `ResumableModule`, which has the state.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    @_for_its_module
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Prepare a run, and drop what an earlier one has left of a checkpoint."""
        pl_module._settings.forget()
        pl_module._random_state.forget()
        pl_module._step_losses.clear()
        checkpoints.use_safe_checkpoint_io(trainer)

    @_for_its_module
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Add what it takes to rebuild the decoder, to read its tokens and to resume exactly."""
        checkpoints.add_content(checkpoint, pl_module, getattr(trainer, "datamodule", None))
        checkpoint["random_state"] = pl_module._random_state.of_all_ranks(trainer)
        checkpoint["optimizer_settings"] = pl_module._settings.current

    @_for_its_module
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Note what `fit` is to resume with.

        The checkpoint is checked once more, since a hook of the module that does so before the
        weights are loaded may be overridden; callbacks take the paths in it over only now.
        """
        checkpoints.check_content(checkpoint, pl_module, trainer)
        if trainer.state.fn == "fit":
            pl_module._random_state.load(checkpoint, trainer)
            pl_module._settings.load(checkpoint)

    @_for_its_module
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse an optimizer that cannot continue from the state which is restored next."""
        pl_module._settings.check()

    @_for_its_module
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Let optimizer and schedule settings of this run hold over those that were restored."""
        optimization.check_validated(trainer)
        remove_leftovers(trainer)
        check_same_batches(trainer)
        pl_module._settings.apply(trainer, pl_module.lr_scheduler)

    @_for_its_module
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Continue the random numbers of a resumed run, once its loaders are running."""
        pl_module._random_state.begin_batch()

    @_for_its_module
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Forget how a batch began, which is not taken again."""
        pl_module._random_state.end_batch()

    @_for_its_module
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin the mean over the split, with state that later runs may change too."""
        pl_module.val_loss.begin()

    @_for_its_module
    def on_test_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin the mean over the split."""
        pl_module.test_loss.begin()

    @_for_its_module
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the loss over the whole split, and step the schedules that watch a metric.

        They step before this validation's checkpoint is written, so that it holds the step.
        """
        _log_split(pl_module, pl_module.val_loss, "val")
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            optimization.step_plateaus(trainer)

    @_for_its_module
    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the loss over the whole split."""
        _log_split(pl_module, pl_module.test_loss, "test")


def beside_resumption(configure: Callable[[Any], Any]) -> Callable[[Any], list[Callback]]:
    """A module's `configure_callbacks` that also gives its `Resumption`, unless the Trainer has it.

    Args:
        configure: gives a callback, or several.
    """

    @wraps(configure)
    def both(module: Any) -> list[Callback]:
        given = configure(module)
        given = list(given) if isinstance(given, Sequence) else [given]
        present = [*given, *getattr(module._trainer, "callbacks", [])]
        if any(isinstance(each, Resumption) and each.module is module for each in present):
            return given
        return [*given, Resumption(module)]

    both.__dict__[_MARK] = True
    return both


def is_beside_resumption(configure: object) -> bool:
    """Whether a function is one of `beside_resumption`."""
    return hasattr(configure, _MARK)


def _log_split(pl_module: Any, metric: EvaluationLoss, split: str) -> None:
    data = getattr(pl_module.trainer, "datamodule", None)
    for name, value in metric.summary(split, data).items():
        # The same on all ranks already; Lightning warns where `sync_dist` is missing.
        pl_module.log(f"{split}/{name}", value, prog_bar=name == "loss", sync_dist=True)

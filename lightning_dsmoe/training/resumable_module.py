"""What language models of any architecture have in common as LightningModules."""

from typing import Any

from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch.optim import Optimizer

from lightning_dsmoe.training import bad_step, checkpoints, gradients, optimization
from lightning_dsmoe.training.evaluation_loss import EvaluationLoss
from lightning_dsmoe.training.leftovers import remove_leftovers
from lightning_dsmoe.training.optimizer_settings import ResumableSettings
from lightning_dsmoe.training.random_state import ResumableRandomState
from lightning_dsmoe.training.same_batches import check_same_batches


class ResumableModule(LightningModule):
    """Base of language models whose interrupted runs go on as if they had not been.

    It makes the optimizer, checks gradients, writes and checks checkpoints, and logs the losses of
    whole splits, `val_loss` and `test_loss`, which a subclass updates in its steps.

    Args:
        optimizer: factory of the optimizer, called with parameter groups.
        lr_scheduler: factory of a learning-rate schedule, stepped after every optimizer step.
    """

    def __init__(
        self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
    ) -> None:
        super().__init__()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self._settings = ResumableSettings()
        self._random_state = ResumableRandomState()
        self._step_losses = bad_step.StepLosses()
        self.val_loss = EvaluationLoss()
        self.test_loss = EvaluationLoss()

    def setup(self, stage: str) -> None:
        """Prepare a run, and drop what an earlier one has left of a checkpoint."""
        self._settings.forget()
        self._random_state.forget()
        self._step_losses.clear()
        checkpoints.use_safe_checkpoint_io(self._trainer)

    def on_validation_epoch_start(self) -> None:
        """Begin the mean over the split, with state that later runs may change too."""
        self.val_loss.begin()

    def on_test_epoch_start(self) -> None:
        """Begin the mean over the split."""
        self.test_loss.begin()

    def on_validation_epoch_end(self) -> None:
        """Log the loss over the whole split, and step the schedules that watch a metric.

        They step before this validation's checkpoint is written, so that it holds the step.
        """
        self._log_epoch(self.val_loss, "val")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            optimization.step_plateaus(self.trainer)

    def on_test_epoch_end(self) -> None:
        """Log the loss over the whole split."""
        self._log_epoch(self.test_loss, "test")

    def configure_optimizers(self) -> Any:
        """Optimizer, without weight decay of norms and biases, and the schedule.

        A schedule steps after every optimizer step, `lightning.pytorch.cli.ReduceLROnPlateau` after
        every validation.
        """
        optimizer = optimization.make_optimizer(self.optimizer, self)
        schedule = self._settings.make_schedule(optimizer, self.lr_scheduler)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": optimization.schedule_options(schedule)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what it takes to rebuild the decoder, to read its tokens and to resume exactly."""
        checkpoints.add_content(checkpoint, self, getattr(self._trainer, "datamodule", None))
        checkpoint["random_state"] = self._random_state.of_all_ranks(self._trainer)
        checkpoint["optimizer_settings"] = self._settings.current

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint, and note what `fit` is to resume with."""
        checkpoints.check_content(checkpoint, self, self._trainer)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self._random_state.load(checkpoint, self._trainer)
            self._settings.load(checkpoint)

    def on_fit_start(self) -> None:
        """Refuse an optimizer that cannot continue from the state which is restored next."""
        self._settings.check()

    def on_train_start(self) -> None:
        """Let optimizer and schedule settings of this run hold over those that were restored."""
        optimization.check_validated(self.trainer)
        remove_leftovers(self.trainer)
        check_same_batches(self.trainer)
        self._settings.apply(self.trainer, self.lr_scheduler)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Continue the random numbers of a resumed run, once its loaders are running."""
        self._random_state.begin_batch()

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a schedule, unless it waits for a validation."""
        if metric is not None or not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Check that losses and gradients are finite, then clip them.

        Where the precision scales gradients (fp16) and skips steps that overflow by itself,
        gradients are left to Lightning.

        Raises:
            FloatingPointError: if a loss or a gradient is not finite.
        """
        limit = gradient_clip_val, gradient_clip_algorithm
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            gradients.check_losses(self, self._step_losses)
            super().configure_gradient_clipping(optimizer, *limit)
        else:
            gradients.check_and_clip(self, optimizer, self._step_losses, *limit)
        self._step_losses.clear()

    def _log_epoch(self, metric: EvaluationLoss, split: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        for name, value in metric.summary(split, data).items():
            # The same on all ranks already; Lightning warns where `sync_dist` is missing.
            self.log(f"{split}/{name}", value, prog_bar=name == "loss", sync_dist=True)

    def _logs_are_due(self) -> bool:
        """Whether loggers write what this step logs; preparing it costs time at every step."""
        if self._trainer is None:
            return False
        every = self._trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (self.global_step + 1) % every == 0

"""What language models of any architecture have in common as LightningModules."""

from typing import Any

from lightning import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch.optim import Optimizer

from lightning_dsmoe.training import bad_step, checkpoints, gradients, optimization
from lightning_dsmoe.training.evaluation_loss import EvaluationLoss
from lightning_dsmoe.training.optimizer_settings import ResumableSettings
from lightning_dsmoe.training.random_state import ResumableRandomState
from lightning_dsmoe.training.resumption import beside_resumption, is_beside_resumption


class ResumableModule(LightningModule):
    """Base of language models whose interrupted runs go on as if they had not been.

    It makes the optimizer and checks gradients. A callback that every subclass has, `Resumption`,
    writes and checks checkpoints, and logs the losses of whole splits, `val_loss` and `test_loss`,
    which a subclass updates in its steps; so hooks may be overridden without `super()`. Only a
    file of weights alone (`save_weights_only`) is described by `on_save_checkpoint` itself.

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

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the callbacks that a subclass configures come beside that of this class."""
        super().__init_subclass__(**options)
        if not is_beside_resumption(cls.configure_callbacks):
            cls.configure_callbacks = beside_resumption(  # type: ignore[method-assign]
                cls.configure_callbacks
            )

    @beside_resumption
    def configure_callbacks(self) -> list[Callback]:
        """The callback that saves, restores and logs, `Resumption`; a subclass adds its own."""
        return []

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
        """Describe a file of weights alone, which Lightning shows to no callback."""
        if "format_version" not in checkpoint:
            checkpoints.add_content(checkpoint, self, getattr(self._trainer, "datamodule", None))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint before its weights are loaded."""
        checkpoints.check_content(checkpoint, self, self._trainer)

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

    def _logs_are_due(self) -> bool:
        """Whether loggers write what this step logs; preparing it costs time at every step."""
        if self._trainer is None:
            return False
        every = self._trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (self.global_step + 1) % every == 0

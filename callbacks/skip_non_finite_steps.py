"""Steps that are left out since their loss or gradient is not finite."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_dsmoe.callbacks.needs import check_automatic
from lightning_dsmoe.callbacks.reporting import log_scalars
from lightning_dsmoe.training.bad_step import (
    StepLosses,
    details,
    gradient_norm,
    of_all_ranks,
    problem_of,
)


class SkipNonFiniteSteps(Callback):
    """Leaves out optimizer steps whose loss or gradient is not finite, up to a number of them.

    Without it, such a step ends the training of a `DSMoELanguageModel`, and spoils the weights of a
    LightningModule that checks nothing; with `limit=0` it ends the training of any.

    A step is left out by taking its gradients away, those of all accumulated batches together:
    weights and the states of the optimizer stay as they are. Steps and the schedule of the learning
    rate count on. All ranks leave out a step, or none. Each is told in a warning, with the ranks
    whose step is bad and the position of a batch of theirs in the data; one step more than `limit`
    ends training with an error that shows the values in the layers. `train/skipped_steps` is logged
    whenever it grows, and is saved in checkpoints, so that the limit holds over all resumed parts
    of a run.

    Where the precision scales gradients (`precision="16-mixed"`), it leaves out steps by itself, as
    a part of finding the scale, and this callback does nothing.

    Args:
        limit: steps that may be left out.

    Raises:
        ValueError: if `limit` is negative or, before training, with manual optimization.
        FloatingPointError: in training, if more steps than `limit` are not finite.

    Examples:
        >>> from lightning import Trainer
        >>> from lightning_dsmoe.callbacks import SkipNonFiniteSteps
        >>> skip = SkipNonFiniteSteps(limit=5)
        >>> trainer = Trainer(callbacks=[skip], logger=False, accelerator="cpu")
        >>> skip.skipped
        0
    """

    def __init__(self, *, limit: int = 10) -> None:
        if limit < 0:
            raise ValueError(f"limit must be at least 0, got {limit}")
        self.limit = limit
        self.skipped = 0
        self._losses = StepLosses()
        self._batch: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_automatic(self, pl_module)
        self._losses.clear()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._losses.add(trainer.fit_loop.batch_idx, self._batch, loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        norm = gradient_norm(optimizer)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if norm is not None and not scaled:
            problem = problem_of(pl_module, self._losses, norm)
            # Strategies that average no losses and no gradients of shards let ranks disagree.
            if not trainer.strategy.reduce_boolean_decision(not problem, all=True):
                self._skip(trainer, pl_module, optimizer, problem)
        self._losses.clear()

    def on_train_batch_end(self, *_: Any) -> None:
        self._batch = None

    def _skip(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, problem: str
    ) -> None:
        self.skipped += 1
        problem, where = of_all_ranks(trainer, self._losses, problem)
        if self.skipped > self.limit:
            raise FloatingPointError(
                f"{problem}; no step was taken, and limit={self.limit} others of this run were "
                f"left out before{details(pl_module, self._batch)}"
            )
        optimizer.zero_grad(set_to_none=True)
        log_scalars(trainer, {"train/skipped_steps": float(self.skipped)})
        rank_zero_warn(
            f"{problem}; the step is left out, {self.skipped} of at most {self.limit} ({where})"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = int(state_dict["skipped"])

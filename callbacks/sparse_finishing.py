"""A last phase of training that runs only some experts."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_dsmoe.callbacks.needs import PlanSpec, check_automatic, check_runs, load_plan
from lightning_dsmoe.moved import warn_renamed
from lightning_dsmoe.routing import run_plan


class SparseFinishing(Callback):
    """Trains the last steps of `fit` under the plan, or plans, that the model is to run with later.

    In these steps only the plan's experts run for a token, so what the model logs in them is of the
    step's plan. A `DSMoELanguageModel` with a `consistency_weight` trains in the same steps with
    all experts too and keeps the two predictions alike, in about twice the time and with twice the
    activations in memory. Alternating between plans that run more and fewer experts makes one model
    that serves all active shares between them.

    Validation continues with the model as it is configured, so that `val/loss` means the same in
    the whole run; `SparseEvaluation` logs the loss under the plan.

    Which steps are the last ones depends on the length of the run and the number of optimizer steps
    alone, so a run resumed with the same length continues exactly. A run that is stopped earlier,
    by time or by another callback, may never get there.

    Args:
        plan: a plan, or the path of a saved one.
        steps: optimizer steps of the phase; fewer than the run, whose length `max_steps` or
            `max_epochs` of the trainer has to set.
        alternate_with: further plans; `plan` runs in the first step, then each step runs the next
            one.
        turns_with: old name of `alternate_with`, until version 0.3.

    Raises:
        ValueError: if a file is not a plan, `steps` is below 1 or there is another SparseFinishing,
            and before the first step if the plan does not fit the model, the length of the run is
            unknown or `steps` is not below it.

    Examples:
        >>> from lightning_dsmoe import SelectionPlan, TopK
        >>> from lightning_dsmoe.callbacks import SparseFinishing
        >>> plans = [SelectionPlan(experts=TopK(k)) for k in (2, 4)]
        >>> finishing = SparseFinishing(plans[0], steps=100, alternate_with=plans[1:])
        >>> len(finishing.plans)
        2
    """

    def __init__(
        self,
        plan: PlanSpec,
        *,
        steps: int,
        alternate_with: Sequence[PlanSpec] = (),
        turns_with: Sequence[PlanSpec] | None = None,
    ) -> None:
        if turns_with is not None:
            warn_renamed("turns_with", "alternate_with")
            alternate_with = (*alternate_with, *turns_with)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.plans = [load_plan("SparseFinishing", each) for each in (plan, *alternate_with)]
        self.steps = steps
        self._first = 0
        self._running = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, SparseFinishing) for callback in callbacks) > 1:
            raise ValueError("one SparseFinishing per trainer, since both would set the plan")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_automatic(self, pl_module)
        for plan in self.plans:
            check_runs("SparseFinishing", plan, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        if total in (math.inf, -1):
            raise ValueError(
                f"SparseFinishing, steps={self.steps}: the last steps of a run without an end are "
                "unknown; set max_steps or max_epochs of the trainer"
            )
        if self.steps >= total and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"SparseFinishing, steps={self.steps}: must be below {total}, "
                "the number of optimizer steps of the run"
            )
        self._first = int(total) - self.steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._running.close()  # a batch that was skipped had no end
        step = trainer.global_step - self._first
        if step >= 0:
            plan = self.plans[step % len(self.plans)]
            self._running.enter_context(run_plan(pl_module, plan))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._running.close()

    on_train_epoch_end = on_exception
    on_train_batch_end = on_exception  # type: ignore[assignment]

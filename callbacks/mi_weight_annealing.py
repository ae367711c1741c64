"""A schedule of the weights of the mutual-information loss."""

import math
from typing import Any, Literal, get_args

from lightning import LightningModule, Trainer

from lightning_dsmoe.callbacks.mi_weight_setter import MI_WEIGHTS, MIWeightSetter
from lightning_dsmoe.callbacks.needs import check_automatic

Schedule = Literal["linear", "cosine", "constant_then_ramp"]


class MIWeightAnnealing(MIWeightSetter):
    """Anneals the weights of the mutual-information loss: scales them by a factor per step.

    The factor multiplies the weights of the model's `RoutingLoss`. It depends on the number of
    optimizer steps alone, so a resumed run continues exactly. Once training ends, for whatever
    reason, the model has its own weights again.

    Args:
        schedule: "linear" or "cosine" from the first step on; "constant_then_ramp" keeps `start`
            for `delay` steps, then is linear.
        start: factor at the beginning.
        end: factor at the end.
        steps: optimizer steps from `start` to `end`.
        delay: optimizer steps before a ramp; 0 for the other schedules.

    Raises:
        ValueError: if the schedule does not exist or a number is out of range, and before training
            if the model has no `RoutingLoss`, or more than one.

    Examples:
        >>> from lightning_dsmoe.callbacks import MIWeightAnnealing
        >>> annealing = MIWeightAnnealing(schedule="cosine", start=0.0, end=1.0, steps=1000)
        >>> round(annealing.factor(500), 3)
        0.5
    """

    def __init__(
        self,
        *,
        schedule: Schedule = "linear",
        start: float = 0.0,
        end: float = 1.0,
        steps: int,
        delay: int = 0,
    ) -> None:
        super().__init__()
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {get_args(Schedule)}, got {schedule!r}")
        if not (0 <= start < math.inf and 0 <= end < math.inf):
            raise ValueError(f"factors must be 0 or more, got start={start}, end={end}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if delay < 0 or (delay > 0) != (schedule == "constant_then_ramp"):
            raise ValueError(
                "delay must be at least 1 for constant_then_ramp and 0 for other schedules, "
                f"got delay={delay} for {schedule}"
            )
        self.schedule, self.start, self.end = schedule, start, end
        self.steps, self.delay = steps, delay

    def factor(self, step: int) -> float:
        """Factor after a number of optimizer steps."""
        progress = min(1.0, max(0.0, (step - self.delay) / self.steps))
        if self.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return (1 - progress) * self.start + progress * self.end

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_automatic(self, pl_module)
        self._remember(pl_module, MI_WEIGHTS)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        factors = dict.fromkeys(MI_WEIGHTS, self.factor(trainer.global_step))
        self._scale(factors)
        self._log(trainer, trainer.global_step, factors)

"""A schedule of the weights of the mutual-information loss."""

import math
from typing import Any, Literal, get_args

from lightning import LightningModule, Trainer

from lightning_dsmoe.callbacks.mi_weight_setter import MIWeightSetter
from lightning_dsmoe.callbacks.routed_model import MI_WEIGHTS

Schedule = Literal["linear", "cosine", "constant_then_ramp"]


def annealed_factor(
    step: int, *, schedule: Schedule, start: float, end: float, steps: int, delay: int = 0
) -> float:
    """Factor at an optimizer step: from `start` after `delay` steps to `end` another `steps` later.

    Args:
        step: optimizer steps taken so far.
        schedule: "linear" and "constant_then_ramp" are straight, "cosine" is half a cosine wave.
        start: factor up to step `delay`.
        end: factor from step `delay + steps` on.
        steps: optimizer steps of the change.
        delay: optimizer steps before it.

    Examples:
        >>> from lightning_dsmoe.callbacks.mi_weight_annealing import annealed_factor
        >>> [annealed_factor(s, schedule="linear", start=0, end=1, steps=4) for s in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    progress = min(1.0, max(0.0, (step - delay) / steps))
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return (1 - progress) * start + progress * end


class MIWeightAnnealing(MIWeightSetter):
    """Anneals the weights of the mutual-information loss: scales them by a factor per step.

    The factor multiplies the weights that the model is configured with. It depends on the number of
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
        ValueError: if the schedule does not exist or a number is out of range.

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
        """Factor at an optimizer step."""
        return annealed_factor(
            step,
            schedule=self.schedule,
            start=self.start,
            end=self.end,
            steps=self.steps,
            delay=self.delay,
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remember(pl_module, MI_WEIGHTS)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        factors = dict.fromkeys(MI_WEIGHTS, self.factor(trainer.global_step))
        self._scale(pl_module, factors)
        self._log(trainer, trainer.global_step, factors)

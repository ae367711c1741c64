"""Learning-rate schedules."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class LinearWarmupCosine(LambdaLR):
    """Linear warm-up, then cosine decay to a fraction of the peak learning rate, per step.

    Args:
        optimizer: the optimizer, with the peak learning rate.
        max_steps: optimizer step at which the decay ends.
        warmup_steps: optimizer steps of the warm-up.
        min_ratio: final learning rate as a fraction of the peak.

    Raises:
        ValueError: if the warm-up is not shorter than the schedule or a value is out of range.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.schedules import LinearWarmupCosine
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = LinearWarmupCosine(optimizer, max_steps=6, warmup_steps=2, min_ratio=0.1)
        >>> rates = []
        >>> for _ in range(7):
        ...     rates.append(round(schedule.get_last_lr()[0], 3))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1]
    """

    def __init__(
        self, optimizer: Optimizer, max_steps: int, *, warmup_steps: int = 0, min_ratio: float = 0.1
    ) -> None:
        if not 0 <= warmup_steps < max_steps or not 0 <= min_ratio <= 1:
            raise ValueError(
                "a schedule needs 0 <= warmup_steps < max_steps and 0 <= min_ratio <= 1, "
                f"got {warmup_steps}, {max_steps} and {min_ratio}"
            )

        # Part of the state, so that a resumed run finds out whether they changed.
        self.max_steps, self.warmup_steps, self.min_ratio = max_steps, warmup_steps, min_ratio

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))
            return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2

        super().__init__(optimizer, factor)

"""Learning-rate schedules that PyTorch does not have in one piece."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class LinearWarmupCosine(LambdaLR):
    """Linear warm-up, then a cosine to a share of the full learning rate, per step.

    Args:
        optimizer: the optimizer whose learning rate is the full one.
        max_steps: step at which the cosine ends.
        warmup_steps: steps of the warm-up.
        min_ratio: share of the full learning rate at the end.

    Raises:
        ValueError: if the warm-up is not shorter than the schedule or a value is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_steps: int,
        *,
        warmup_steps: int = 0,
        min_ratio: float = 0.1,
    ) -> None:
        if not 0 <= warmup_steps < max_steps or not 0 <= min_ratio <= 1:
            raise ValueError(
                "a schedule needs 0 <= warmup_steps < max_steps and 0 <= min_ratio <= 1, "
                f"got {warmup_steps}, {max_steps} and {min_ratio}"
            )

        # Kept in the state, so that a resumed run can tell whether they changed.
        self.max_steps, self.warmup_steps, self.min_ratio = max_steps, warmup_steps, min_ratio

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))
            return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2

        super().__init__(optimizer, factor)

"""How a loss weight follows the gate mass of the experts with the largest gates.

Shapes: N tokens, E experts; leading dimensions (tokens) are free.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dsmoe.losses.token_sums import flatten_tokens

_LEAST_MISSING = 1e-6  # what float32 can still tell from nothing
_MOST_MASS = 0.9999


def gate_mass_totals(probs: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Sum over tokens of the k largest probabilities, and the number of tokens.

    Args:
        probs: what a router said, `[..., E]`.
        k: number of experts that are summed, from 1 to E.
        mask: tokens that count, bool `[...]`; None counts all.

    Returns:
        The two numbers, `[2]`; their sums over routers, batches and ranks divide to a mean.
    """
    probs_NE, weight_N = flatten_tokens(probs, mask)
    mass_N = probs_NE.topk(k, sorted=False).values.sum(-1)
    return torch.stack([weight_N @ mass_N, weight_N.sum()])


@dataclass(frozen=True)
class GateMassController:
    """Proportional-derivative controller that multiplies a weight until a gate mass is reached.

    f <- clip(f rate^clip(e, -1, 1), least, most)

    e = d + ahead (d - d'), d = ln((1 - m) / (1 - target)): how far the mass that is missing is from
    what may be missing, if the trend since the measurement before (d') goes on. A change is `rate`
    or 1/`rate` far from the target and fades out close to it. Routing answers a weight late:
    without the trend, the weight would grow until the mass is there, and overshoot.

    Args:
        target: the gate mass that is wanted, above 0 and at most 0.9999.
        rate: the largest factor of a change, above 1.
        ahead: measurements by which the trend is continued.
        least: lower bound of f, above 0 and at most 1.
        most: upper bound of f, 1 or more.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> controller = GateMassController(target=0.9, rate=1.5, ahead=0.0, least=0.1, most=10.0)
        >>> controller.next_factor(1.0, mass=0.5, mass_before=0.5)  # far below: as much as it may
        1.5
        >>> controller.next_factor(1.0, mass=0.9, mass_before=0.9)
        1.0
    """

    target: float
    rate: float
    ahead: float
    least: float
    most: float

    def __post_init__(self) -> None:
        if not 0 < self.target <= _MOST_MASS:
            raise ValueError(f"mass must be above 0 and at most {_MOST_MASS}, got {self.target}")
        if not 1 < self.rate < math.inf:
            raise ValueError(f"rate must be above 1, got {self.rate}")
        if not 0 <= self.ahead < math.inf:
            raise ValueError(f"ahead must be 0 or more, got {self.ahead}")
        if not 0 < self.least <= 1 <= self.most < math.inf:
            raise ValueError(
                f"bounds must be 0 < least <= 1 <= most, got {self.least} and {self.most}"
            )

    def next_factor(self, factor: float, mass: float, mass_before: float) -> float:
        """Factor f of the weight after a measurement.

        Args:
            factor: f so far.
            mass: the measured mass m.
            mass_before: the mass of the measurement before.
        """
        distance, distance_before = (
            math.log(max(1 - m, _LEAST_MISSING) / (1 - self.target)) for m in (mass, mass_before)
        )
        error = distance + self.ahead * (distance - distance_before)
        factor *= math.pow(self.rate, min(1.0, max(-1.0, error)))
        return min(self.most, max(self.least, factor))

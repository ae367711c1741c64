"""How a weight follows the gate mass that the top experts hold.

Shapes: B batch, T tokens.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dsmoe.routing import Routing

_LEAST_MISSING = 1e-6  # what float32 can still tell from nothing
_MOST_MASS = 0.9999


def top_mass(routings: Sequence[Routing | None], k: int, mask_BT: Tensor) -> Tensor:
    """Sum over tokens of the k largest probabilities, mean over routers; and the token count.

    Args:
        routings: of each layer, None for a layer without a router; one at least has one.
        k: number of experts that are summed, from 1 to all.
        mask_BT: tokens that count, bool.

    Returns:
        The two numbers, `[2]`; their sums over batches and ranks divide to a mean over tokens.
    """
    held_BT = [r.probs.topk(k, sorted=False).values.sum(-1) for r in routings if r is not None]
    return torch.stack([torch.stack(held_BT).mean(0)[mask_BT].sum(), mask_BT.sum()])


def steered_factor(
    factor: float,
    mass: float,
    before: float,
    *,
    target: float,
    rate: float,
    ahead: float,
    least: float,
    most: float,
) -> float:
    """Factor after a measurement, f <- clip(f rate^clip(e, -1, 1), least, most).

    e = d + ahead (d - d'), d = ln((1 - m) / (1 - target)): how far the mass that is missing is from
    what may be missing, if the trend since the measurement before (d') goes on. A change is `rate`
    or 1/`rate` far from the target and fades out close to it.

    Args:
        factor: f so far.
        mass: the measured mass m.
        before: the mass measured before it.
        target: the mass that is wanted, below 1.
        rate: the largest change.
        ahead: measurements to look ahead.
        least: lower bound of f.
        most: upper bound of f.
    """
    distance, distance_before = (
        math.log(max(1 - m, _LEAST_MISSING) / (1 - target)) for m in (mass, before)
    )
    error = distance + ahead * (distance - distance_before)
    return min(most, max(least, factor * math.pow(rate, min(1.0, max(-1.0, error)))))


def check_steering(*, target: float, rate: float, ahead: float, least: float, most: float) -> None:
    """Raise a ValueError if `steered_factor` cannot steer with these numbers."""
    if not 0 < target <= _MOST_MASS:
        raise ValueError(f"mass must be above 0 and at most {_MOST_MASS}, got {target}")
    if not 1 < rate < math.inf:
        raise ValueError(f"rate must be above 1, got {rate}")
    if not 0 <= ahead < math.inf:
        raise ValueError(f"ahead must be 0 or more, got {ahead}")
    if not 0 < least <= 1 <= most < math.inf:
        raise ValueError(f"bounds must be 0 < least <= 1 <= most, got {least} and {most}")

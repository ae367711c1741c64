"""Rotary positions (RoPE).

Shapes: C head width, R rotating channels of it; leading dimensions are free.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.attention.rope_scaling import RopeScaling
from lightning_dsmoe.precision import at_least_float32


class Rotary(NamedTuple):
    """How the heads of a layer rotate; layers with equal ones share their angles.

    Args:
        d_rotary: channels R of a head that rotate, the first ones; even.
        theta: base of the frequencies.
        scaling: changes the frequencies; None for none.
    """

    d_rotary: int
    theta: float
    scaling: RopeScaling | None = None


class Rotation(NamedTuple):
    """Cosine and signed sine of the angle of each rotating channel, float32 `[..., R]`.

    The sine is negative for the first channel of each pair (i, i + R/2).
    """

    cos: Tensor
    sin: Tensor


def rotary_of(
    d_head: int, theta: float | None, scaling: RopeScaling | None = None, fraction: float = 1.0
) -> Rotary | None:
    """How heads rotate, from the options of an attention layer; None without rotary positions.

    Args:
        d_head: head width C.
        theta: base of the frequencies; None for no rotary positions.
        scaling: changes the frequencies; None for none.
        fraction: share of the channels that rotate; R = C fraction, rounded down.

    Raises:
        ValueError: if an option is out of range, R is odd or 0, or there is a scaling without
            rotary positions.
    """
    if scaling is not None and not isinstance(scaling, RopeScaling):
        raise ValueError(f"rope_scaling must be a RopeScaling, got {scaling!r:.200}")
    if type(scaling).__hash__ is None:  # layers with equal scalings share their angles
        raise ValueError(f"{type(scaling).__name__} must be hashable, such as a frozen dataclass")
    if not 0 < fraction <= 1:
        raise ValueError(f"rotary_fraction must be above 0 and at most 1, got {fraction}")
    if theta is None:
        if scaling is not None or fraction != 1:
            raise ValueError(
                "rope_scaling and rotary_fraction need rotary positions, got rope_theta=None"
            )
        return None
    d_rotary = int(d_head * fraction)  # rounded as transformers does
    if d_rotary % 2 or d_rotary < 1 or theta <= 0:
        what = "d_head" if fraction == 1 else "number of rotating channels"
        share = "" if fraction == 1 else f", rotary_fraction={fraction}"
        raise ValueError(
            f"rotary positions need an even {what} and rope_theta > 0, "
            f"got d_head={d_head}{share}, rope_theta={theta}"
        )
    return Rotary(d_rotary, theta, scaling)


def rotation(
    positions: Tensor, d_rotary: int, theta: float, scaling: RopeScaling | None = None
) -> Rotation:
    """Angles position * theta^(-2 i / R) of the pairs i (arXiv 2104.09864, eq. 15), or scaled ones.

    Args:
        positions: `[...]`, whole numbers.
        d_rotary: rotating channels R of a head, even.
        theta: base of the frequencies.
        scaling: changes the frequencies; None for none.
    """
    pairs = torch.arange(0, d_rotary, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float()
    frequencies = theta ** (-pairs / d_rotary)
    angles = angles * (frequencies if scaling is None else scaling.frequencies(frequencies))
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn each pair of channels (i, i + R/2) of `[..., C]` by its angle, in at least float32.

    Channels from R on stay as they are.
    """
    d_rotary = by.cos.shape[-1]
    if d_rotary < x.shape[-1]:
        return torch.cat([rotate(x[..., :d_rotary], by), x[..., d_rotary:]], dim=-1)
    channels = at_least_float32(x)
    partners = channels.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(channels * by.cos, partners, by.sin).to(x.dtype)

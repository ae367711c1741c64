"""Rotary positions (RoPE).

Shapes: C head width; leading dimensions are free.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.precision import at_least_float32


class Rotation(NamedTuple):
    """Cosine and signed sine of the angle of each channel, float32 `[..., C]`.

    The sine is negative for the first channel of each pair (i, i + C/2).
    """

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, d_head: int, theta: float) -> Rotation:
    """Angles position * theta^(-2 i / C) of the pairs i (arXiv 2104.09864, eq. 15).

    Args:
        positions: `[...]`, whole numbers.
        d_head: head width C, even.
        theta: base of the frequencies.
    """
    pairs = torch.arange(0, d_head, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * theta ** (-pairs / d_head)
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn each pair of channels (i, i + C/2) of `[..., C]` by its angle, in at least float32."""
    channels = at_least_float32(x)
    partners = channels.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(channels * by.cos, partners, by.sin).to(x.dtype)

"""Where one way of running experts gives way to the next."""

from typing import NamedTuple

import torch

from lightning_dsmoe.decoder import Decoder


class SwitchPoints(NamedTuple):
    """Numbers of tokens at which one way of running experts gives way to the next.

    Args:
        gather_up_to: most sequences that decode with the compiled step, up to 16 at a time, which
            reads each expert once that any of them needs. It is compiled for a number of sequences
            when that is first met, and keeps a second copy of the expert weights for more than
            one, or of those in 8 bits or of very small experts for one. 0 compiles nothing;
            off the CPU every number counts as 0.
        grouped_from: fewest tokens for which each expert runs on its own tokens only, in layers
            where an estimate for CPUs says that it is faster; below, and in other layers, all
            experts run on all tokens, those not chosen under gates of zero.
        measured_on: what they were measured on, as `place_of` tells it; elsewhere the defaults
            hold. None for numbers that hold anywhere.
    """

    gather_up_to: int = 48
    grouped_from: int = 1
    measured_on: str | None = None


def check(points: SwitchPoints) -> SwitchPoints:
    """Raise a ValueError if a number is negative."""
    if min(points.gather_up_to, points.grouped_from) < 0:
        raise ValueError(f"switch points must be 0 or more, got {points}")
    return points


def place_of(decoder: Decoder) -> str:
    """What a decoder's speed depends on besides its shape: the device, its type and threads."""
    weight = decoder.embedding.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.device.type == "cuda":
        return f"{torch.cuda.get_device_name(weight.device)}, {dtype}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{weight.device.type} with {capability}, {torch.get_num_threads()} threads, {dtype}"


def here(points: SwitchPoints, decoder: Decoder) -> SwitchPoints:
    """Switch points if they hold for a decoder where it is, otherwise the defaults."""
    held = points if points.measured_on in (None, place_of(decoder)) else SwitchPoints()
    on_cpu = decoder.embedding.weight.device.type == "cpu"
    return held if on_cpu else held._replace(gather_up_to=0)

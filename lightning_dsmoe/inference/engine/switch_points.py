"""Where one method of running experts gives way to the next."""

from typing import NamedTuple

import torch

from lightning_dsmoe.decoder import Decoder


class SwitchPoints(NamedTuple):
    """Batch sizes at which a sparse model changes the method by which it runs experts.

    The defaults hold on any machine; `SparseModel.tune` measures those of this one.

    Args:
        gather_up_to: in sequences; up to so many decode with a compiled step, at most 16 at a
            time, which reads only experts that one of them needs, and each once. A step is
            compiled for a number of sequences when it is first met, and keeps a second copy of
            the expert weights for more than one sequence, and for one if they are in 8 bits or
            the experts very small. 0 compiles nothing; off the CPU every number counts as 0.
        grouped_from: in tokens of one forward pass (batch size times new positions); from so many
            on each expert runs on its own tokens only, in layers where that is estimated to be
            faster. Below, and in other layers, all experts run on all tokens, those not chosen
            under gates of zero. 0 and 1 are the same.
        measured_on: device, type and threads on which they were measured; elsewhere the defaults
            hold. None for numbers that hold anywhere.

    Examples:
        >>> from lightning_dsmoe.inference import SwitchPoints
        >>> SwitchPoints()
        SwitchPoints(gather_up_to=48, grouped_from=1, measured_on=None)
        >>> never_compile = SwitchPoints(gather_up_to=0)
        >>> never_compile.gather_up_to
        0
    """

    # Faster than grouped up to 48 sequences under one plan and 32 under a sparser one, of a model
    # of 100 M parameters on two cores; see docs/lab_notes/batched.md.
    gather_up_to: int = 48
    # From one token on, since each layer estimates for itself where masked is faster.
    grouped_from: int = 1
    measured_on: str | None = None


def place_of(decoder: Decoder) -> str:
    """What a decoder's speed depends on besides its shape: device, type and number of threads."""
    weight = decoder.embedding.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.device.type == "cuda":
        return f"{torch.cuda.get_device_name(weight.device)}, {dtype}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{weight.device.type} with {capability}, {torch.get_num_threads()} threads, {dtype}"


def here(points: SwitchPoints, decoder: Decoder) -> SwitchPoints:
    """Switch points if they hold where a decoder is, otherwise the defaults."""
    valid = points if points.measured_on in (None, place_of(decoder)) else SwitchPoints()
    on_cpu = decoder.embedding.weight.device.type == "cpu"
    return valid if on_cpu else valid._replace(gather_up_to=0)

"""Where one method of running experts gives way to the next."""

from typing import NamedTuple

import torch

from lightning_dsmoe.decoder import Decoder

# Of any plan; more sequences leave few experts that none of them needs. Not measured.
_GATHER_UP_TO_ON_CUDA = 16


class SwitchPoints(NamedTuple):
    """Batch sizes at which a sparse model changes the method by which it runs experts.

    The defaults hold on any machine; `SparseModel.tune` measures those of this one.

    Args:
        gather_up_to: in sequences; up to so many decode with a compiled step, at most 16 at a
            time, which reads only experts that one of them needs, and each once. A step is
            compiled for 1, 2, 4, 8 or 16 sequences when it is first met, and may keep a second copy
            of the expert weights: on a CPU for more than one sequence, and for one if the
            experts are very small, or in 8 bits where there is AVX-512. 0 compiles nothing. On a
            CUDA GPU more than 16 count as 16 unless measured there; on other devices every number
            counts as 0.
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
    most = _most_gathered(decoder.embedding.weight.device.type)
    if most is None or (valid.measured_on and most):
        return valid
    return valid._replace(gather_up_to=min(most, valid.gather_up_to))


def _most_gathered(device_type: str) -> int | None:
    """The most sequences that gather weights on a kind of device, None for any number."""
    if device_type == "cpu":
        return None
    return _GATHER_UP_TO_ON_CUDA if device_type == "cuda" else 0

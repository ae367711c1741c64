"""Comparing a certificate and a sparse model with a new measurement and with their checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dsmoe.analysis.certificate.judgement import Judgement
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import SelectionPlan, SparseModel, compile_sparse, prune
from lightning_dsmoe.serialization.architecture import build_decoder, describe_decoder
from lightning_dsmoe.serialization.architecture import differences as parts_that_differ
from lightning_dsmoe.serialization.pruning import remaining_experts

ROUNDING = 1e-5
"""Largest difference of logits, relative to the largest one, that rounding to float32 explains."""

_OTHER_CODES = 1e-3
"""Largest share of the 8-bit codes of a weight that rounding may change, each by one."""
# Rounding differs by machine and may decide which of two near-equal experts runs; that moves shares
# and errors of single tokens more than the loss.
_RELATIVE, _ABSOLUTE = 1e-2, 1e-4
_TOLERANCES = {
    "tokens": (0.0, 0.0),
    "windows": (0.0, 0.0),
    "dense_loss": (1e-3, 0.0),
    "sparse_loss": (1e-3, 0.0),
    "loss_before_quantization": (1e-3, 0.0),
    "active_share_p50": (_RELATIVE, 2e-3),  # quantiles are multiples of 0.001
    "active_share_p95": (_RELATIVE, 2e-3),
}
_OF_DENSE = ("dense_loss", "relative_gap", "relative_gap_95", "kl", "top_1_agreement")


def differences(
    recorded: Mapping[str, Any], measured: Mapping[str, Any], *, dense_too: bool = True
) -> list[str]:
    """Where a certificate differs from a new measurement on the same text.

    Numbers may differ by 1 %, losses by 0.1 %, very small ones by what rounding explains. Values
    that only one of the two has are not compared.

    Args:
        recorded: the certificate.
        measured: the new one.
        dense_too: whether the dense model was the same in both, so that what depends on it counts.

    Returns:
        One phrase for each value that differs.
    """
    old, new = _numbers(recorded), _numbers(measured)
    return [
        f"{name} is {new[name]:.6g}, the certificate says {old[name]:.6g}"
        for name in old
        if name in new
        and (dense_too or name.partition(" ")[0] not in _OF_DENSE)
        and not _close(name, old[name], new[name])
    ]


def check_weights(model: SparseModel, decoder: Decoder) -> None:
    """Raise a ValueError if a sparse model was not made of a decoder.

    Args:
        model: the sparse model.
        decoder: the trained decoder; it is pruned, packed and quantized in the same way to compare.
    """
    remaining = remaining_experts(model.decoder)
    compiled = compile_sparse(
        decoder if remaining is None else prune(decoder, remaining),
        SelectionPlan(),
        quantization=model.quantization,
        quantize_head=model.quantize_head,
    )
    own, expected = model.state_dict(), compiled.state_dict()
    for name in sorted(own.keys() | expected.keys()):
        if name not in own or name not in expected or not _same(own[name], expected[name]):
            raise ValueError(
                f"the artifact was not made of this checkpoint: {name.removeprefix('decoder.')} "
                "differs"
            )
    own_parts = describe_decoder(build_decoder(model.architecture))
    changes = parts_that_differ(compiled.architecture, own_parts)
    if changes:
        raise ValueError(f"the artifact was not made of this checkpoint: {'; '.join(changes)}")


def is_exact(model: SparseModel) -> bool:
    """Whether a sparse model has all weights in float32, so that only rounding changes it."""
    return (
        remaining_experts(model.decoder) is None
        and not model.report().quantized
        and all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    )


def _same(tensor: Tensor, other: Tensor) -> bool:
    if tensor.shape != other.shape:
        return False
    if not tensor.is_floating_point():  # a weight between two codes may fall to either
        steps = (tensor.int() - other.int()).abs()
        return int(steps.max()) <= 1 and int(steps.sum()) <= max(1, _OTHER_CODES * steps.numel())
    return torch.allclose(tensor, other.to(tensor.dtype), rtol=1e-6, atol=0)


def _close(name: str, old: float, new: float) -> bool:
    relative, absolute = _TOLERANCES.get(name, (_RELATIVE, _ABSOLUTE))
    return abs(new - old) <= absolute + relative * abs(old)


def _numbers(data: Mapping[str, Any]) -> dict[str, float]:
    """All measured numbers by name, such as "kl" and "experts of layer 3, bound_mean"."""
    numbers: dict[str, float] = {}
    for name in Judgement._fields:
        value = data[name]
        if name in ("experts", "attention"):
            for layer, errors in enumerate(value):
                for field, number in (errors or {}).items():
                    numbers[f"{name} of layer {layer}, {field}"] = number
        elif name == "relative_gap_95" and value is not None:
            numbers[f"{name} from"], numbers[f"{name} to"] = value
        elif value is not None and not isinstance(value, str):
            numbers[name] = value
    return numbers

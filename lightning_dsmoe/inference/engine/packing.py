"""Repacking a decoder's expert weights for inference, in place."""

from collections.abc import Callable

from torch import nn

from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.inference.engine.rows import FloatRows, Rows
from lightning_dsmoe.stacked import StackedWeight

Packer = Callable[..., Rows]


def pack(decoder: Decoder) -> None:
    """Store all expert and head weights row by row, as decoding reads them."""
    for module in list(decoder.modules()):
        for name, transposed in _weights(module).items():
            weight = getattr(module, name)
            if isinstance(weight, StackedWeight):
                matrices = weight.weight.detach()
                rows = matrices.mT if transposed else matrices
                setattr(module, name, FloatRows(rows, transposed=transposed))


def _weights(module: nn.Module) -> dict[str, bool]:
    """Names of a module's stacked weights, and whether decoding reads their columns."""
    if isinstance(module, Experts):
        return {"w_in": False, "w_out": True}
    if isinstance(module, HeadGroups):
        return {"w_q": False, "w_o": True}
    return {}

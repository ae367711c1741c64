"""Weights of all experts in one tensor, each expert's rows adjacent.

Shapes: E experts, R rows of one expert, D width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_dsmoe.placement import Device


class StackedWeight(nn.Module):
    """One weight matrix per expert, stored as `[E, R, D]`, viewed wide or expert by expert.

    Args:
        n_experts: number of experts E.
        rows: rows R of one expert's matrix.
        d_model: columns D.
        fan_in: inputs summed by one output of the layer; initial weights are uniform within
            1 / sqrt(fan_in), as in `torch.nn.Linear`.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.
    """

    def __init__(
        self,
        n_experts: int,
        rows: int,
        d_model: int,
        *,
        fan_in: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fan_in = fan_in
        weight = torch.empty(n_experts, rows, d_model, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        bound = 1 / math.sqrt(self.fan_in)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self) -> Tensor:
        """All experts: `[E, R, D]`."""
        return self.weight

    def of(self, experts: Sequence[int]) -> list[Tensor]:
        """The matrices `[R, D]` of some experts, and only those."""
        matrices = self.weight.unbind(0)
        return [matrices[e] for e in experts]

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        n_experts, rows, d_model = self.weight.shape
        return f"n_experts={n_experts}, rows={rows}, d_model={d_model}"

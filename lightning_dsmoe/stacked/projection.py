"""The wide projection that sums all experts under their gates.

Shapes: X tokens, E experts, F hidden units of one expert, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dsmoe.stacked.dispatch import in_function_transform


def gated_projection(hidden_XEF: Tensor, gates_XE: Tensor, weight_EFD: Tensor) -> Tensor:
    """Sum of all experts' outputs under their gates, as one matrix product.

    y = sum_e g_e (a_e W_e) = (g * a) W

    It keeps `hidden_XEF` for the backward pass rather than the gated product, so that training
    needs hardly more memory than an ungated layer: the gates.

    Shape:
        hidden_XEF: hidden units a; gates_XE: gates g; weight_EFD: W; result: `[X, D]`.
    """
    device = hidden_XEF.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_XEF, weight_EFD = hidden_XEF.to(dtype), weight_EFD.to(dtype)
    if gates_XE.dtype != hidden_XEF.dtype:
        gates_XE = gates_XE.to(hidden_XEF.dtype)
    if in_function_transform():
        return _gated_product(hidden_XEF, gates_XE, weight_EFD)
    projected: Tensor = _GatedProjection.apply(hidden_XEF, gates_XE, weight_EFD)  # type: ignore[no-untyped-call]
    return projected


def _gated_product(hidden_XEF: Tensor, gates_XE: Tensor, weight_EFD: Tensor) -> Tensor:
    return (hidden_XEF * gates_XE[..., None]).flatten(1) @ weight_EFD.flatten(0, 1)


class _GatedProjection(torch.autograd.Function):
    # The one-method form of `forward` spares small models a tenth of a millisecond a call, but
    # `torch.func` cannot transform it, so its transforms get the plain product.
    @staticmethod
    def forward(ctx: Any, hidden_XEF: Tensor, gates_XE: Tensor, weight_EFD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_XEF, gates_XE, weight_EFD)
        return _gated_product(hidden_XEF, gates_XE, weight_EFD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_XEF, gates_XE, weight_EFD = ctx.saved_tensors
        d_gated_XEF = (grad_XD @ weight_EFD.flatten(0, 1).T).view_as(hidden_XEF)
        product_XEF = d_gated_XEF * hidden_XEF
        d_gates_XE = product_XEF.sum(-1)
        d_hidden_XEF = d_gated_XEF.mul_(gates_XE[..., None])
        # Fresh memory is slow on CPUs, so the product's is used again.
        gated_XEF = torch.mul(hidden_XEF, gates_XE[..., None], out=product_XEF)
        d_weight_EFD = (gated_XEF.flatten(1).T @ grad_XD).view_as(weight_EFD)
        return d_hidden_XEF, d_gates_XE, d_weight_EFD

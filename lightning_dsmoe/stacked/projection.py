"""The wide projection that sums all experts under their gates.

Shapes: N tokens, E experts, F hidden units of one expert, D width.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dsmoe.precision import has_autocast
from lightning_dsmoe.torch_private import in_function_transform


def gated_projection(hidden_NEF: Tensor, gates_NE: Tensor, weight_EFD: Tensor) -> Tensor:
    """Sum of all experts' outputs under their gates, as one matrix product.

    y = sum_e g_e (a_e W_e) = (g * a) W

    For the backward pass autograd would keep the gated product beside the hidden units, twice the
    activations of a dense layer. This keeps the hidden units alone and multiplies again.

    Shape:
        hidden_NEF: hidden units a; gates_NE: gates g; weight_EFD: W; result: `[N, D]`.
    """
    device = hidden_NEF.device.type
    if has_autocast(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_NEF, weight_EFD = hidden_NEF.to(dtype), weight_EFD.to(dtype)
    if gates_NE.dtype != hidden_NEF.dtype:
        gates_NE = gates_NE.to(hidden_NEF.dtype)
    if in_function_transform():
        return _gated_product(hidden_NEF, gates_NE, weight_EFD)
    projected: Tensor = _GatedProjection.apply(hidden_NEF, gates_NE, weight_EFD)  # type: ignore[no-untyped-call]
    return projected


def _gated_product(hidden_NEF: Tensor, gates_NE: Tensor, weight_EFD: Tensor) -> Tensor:
    return _flat(hidden_NEF * gates_NE[..., None]) @ _rows(weight_EFD)


def _flat(hidden_NEF: Tensor) -> Tensor:
    return rearrange(hidden_NEF, "n e f -> n (e f)")


def _rows(weight_EFD: Tensor) -> Tensor:
    return rearrange(weight_EFD, "e f d -> (e f) d")


class _GatedProjection(torch.autograd.Function):
    # The one-method form of `forward` spares small models a tenth of a millisecond a call, but
    # `torch.func` cannot transform it, so its transforms get the plain product.
    @staticmethod
    def forward(ctx: Any, hidden_NEF: Tensor, gates_NE: Tensor, weight_EFD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_NEF, gates_NE, weight_EFD)
        return _gated_product(hidden_NEF, gates_NE, weight_EFD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_NEF, gates_NE, weight_EFD = ctx.saved_tensors
        d_gated_NEF = (grad_ND @ _rows(weight_EFD).T).view_as(hidden_NEF)
        product_NEF = d_gated_NEF * hidden_NEF
        d_gates_NE = product_NEF.sum(-1)
        d_hidden_NEF = d_gated_NEF.mul_(gates_NE[..., None])
        # Fresh memory is slow on CPUs, so the product's is used again.
        gated_NEF = torch.mul(hidden_NEF, gates_NE[..., None], out=product_NEF)
        d_weight_EFD = (_flat(gated_NEF).T @ grad_ND).view_as(weight_EFD)
        return d_hidden_NEF, d_gates_NE, d_weight_EFD

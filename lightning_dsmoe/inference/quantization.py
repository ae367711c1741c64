"""8-bit expert weights in the vector-wise format of bitsandbytes.

Shapes: E experts, R rows of one expert, D width.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.stacked import StackedWeight


class Int8StackedWeight(nn.Module):
    """A `StackedWeight` as int8 codes with one float32 scale per quantised row.

    W[e, r, :] = codes[e, r, :] * scales[e, r] / 127, with scales the largest magnitude of the row.
    An expert's matrix becomes floating point when it is asked for, and only then. Moving the module
    to another type changes that of the matrices; codes and scales stay exact.

    Args:
        codes: int8 `[E, R, C]`.
        scales: float32 `[E, R]`.
        transposed: whether the rows quantised are the columns of the matrices, as suits weights
            that are read along them.
        dtype: type of the matrices given out.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self, codes: Tensor, scales: Tensor, *, transposed: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self) -> Tensor:
        """All experts: `[E, R, D]`."""
        return self._matrices(slice(None))

    def of(self, experts: Sequence[int]) -> list[Tensor]:
        """The matrices `[R, D]` of some experts, and only those."""
        return [self._matrices(e) for e in experts]

    def _matrices(self, which: int | slice) -> Tensor:
        scales = (self.scales[which] / 127).to(self.dtype)
        matrices = self.codes[which].to(self.dtype) * scales[..., None]
        return matrices.mT if self.transposed else matrices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"codes={tuple(self.codes.shape)}, transposed={self.transposed}"


def quantize_experts(decoder: Decoder) -> list[str]:
    """Put the weights of all routed experts into int8, in place.

    Routers, norms, shared experts, embeddings and the projections of keys and values stay as they
    are. Rows are quantised as decoding reads them: one scale for each hidden unit's or query's
    input weights, and for each output of an expert.

    Returns:
        The names of the quantised weights.

    Raises:
        ImportError: if bitsandbytes is not installed.
    """
    return _replace(decoder, quantize_int8)


def expect_int8(decoder: Decoder, *, dtype: torch.dtype) -> None:
    """Give a decoder the empty int8 weights that `quantize_experts` would, on its own device.

    Args:
        decoder: the decoder.
        dtype: type of the matrices given out, which is that of the rest of the model.
    """

    def empty(weight: StackedWeight, *, transposed: bool) -> Int8StackedWeight:
        matrices = weight().mT if transposed else weight()
        codes = torch.empty(matrices.shape, dtype=torch.int8, device=matrices.device)
        scales = torch.empty(matrices.shape[:-1], dtype=torch.float32, device=matrices.device)
        return Int8StackedWeight(codes, scales, transposed=transposed, dtype=dtype)

    _replace(decoder, empty)


def quantize_int8(weight: StackedWeight, *, transposed: bool) -> Int8StackedWeight:
    """Quantise matrices row by row with bitsandbytes, on the CPU.

    Args:
        weight: the experts' matrices.
        transposed: quantise the columns of the matrices instead of their rows.

    Raises:
        ImportError: if bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.functional import int8_vectorwise_quant
    except ImportError as error:
        raise ImportError("8-bit experts need bitsandbytes: pip install bitsandbytes") from error
    matrices = weight().detach()
    rows = (matrices.mT if transposed else matrices).contiguous()
    codes, scales, _ = int8_vectorwise_quant(rows.flatten(0, 1).cpu().float())
    return Int8StackedWeight(
        codes.view(rows.shape).to(matrices.device),
        scales.view(rows.shape[:-1]).to(matrices.device),
        transposed=transposed,
        dtype=matrices.dtype,
    )


def quantized_bytes(decoder: Decoder) -> dict[str, int]:
    """Bytes of codes and scales of each quantised weight, by its name."""
    return {
        name: module.codes.nbytes + module.scales.nbytes
        for name, module in decoder.named_modules()
        if isinstance(module, Int8StackedWeight)
    }


class _Quantizer(Protocol):
    def __call__(self, weight: StackedWeight, *, transposed: bool) -> Int8StackedWeight: ...


def _replace(decoder: Decoder, quantizer: _Quantizer) -> list[str]:
    names = []
    for name, module in list(decoder.named_modules()):
        owner: nn.Module
        if isinstance(module, MixtureOfExperts):
            part, owner, weights = "experts", module.experts, {"w_in": False, "w_out": True}
        elif isinstance(module, MixtureOfAttentionHeads):
            part, owner, weights = "heads", module.heads, {"w_q": False, "w_o": True}
        else:
            continue
        for weight, transposed in weights.items():
            setattr(owner, weight, quantizer(getattr(owner, weight), transposed=transposed))
            names.append(f"{name}.{part}.{weight}")
    return names

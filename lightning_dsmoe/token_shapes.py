"""Mistakes in the shape of tokens, said before a product of matrices stumbles over them.

Shapes are compared as Python numbers, so a check costs nothing that can be measured.
"""

from torch import Tensor


def check_width(x: Tensor, d_model: int) -> None:
    """Raise a ValueError if tokens `[..., D]` are not of a layer's width."""
    if not x.ndim or x.shape[-1] != d_model:
        raise ValueError(f"tokens must be [..., {d_model}] for d_model={d_model}, {_got(x)}")


def check_sequences(x: Tensor, mask: Tensor | None) -> None:
    """Raise a ValueError if tokens are not sequences `[B, T, D]`, or a mask is not theirs."""
    if x.ndim != 3:
        raise ValueError(f"attention needs tokens [B, T, D], {_got(x)}; x[None] is a batch of one")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"a mask of {tuple(mask.shape)} for tokens of {tuple(x.shape[:2])}")


def _got(x: Tensor) -> str:
    return f"got {tuple(x.shape)}"

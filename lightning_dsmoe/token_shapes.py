"""Mistakes in the shape of tokens, said before a product of matrices stumbles over them.

Shapes are compared as Python numbers, so a check costs nothing that can be measured.
"""

from collections.abc import Sequence

from torch import Tensor


def check_width(x: Tensor, d_model: int) -> None:
    """Raise a ValueError if tokens `[..., D]` are not of a layer's width."""
    if not x.ndim or x.shape[-1] != d_model:
        raise ValueError(f"tokens must be [..., {d_model}] for d_model={d_model}, {_got(x)}")


def check_sequences(x: Tensor, mask: Tensor | None) -> None:
    """Raise a ValueError if tokens are not sequences `[B, T, D]`, or a mask is not theirs."""
    if x.ndim != 3:
        raise ValueError(f"attention needs tokens [B, T, D], {_got(x)}; x[None] is a batch of one")
    if mask is not None:
        check_mask(mask, x.shape[:2])


def check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    """Raise an error if a mask is not one of padding, true for tokens, for tokens `[B, T]`.

    PyTorch's own attention adds masks of floats to scores, and takes true for padding.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"a mask must be a tensor, got {type(mask).__name__}")
    if mask.shape != tuple(shape):
        raise ValueError(
            f"a mask of {tuple(mask.shape)} for tokens of {tuple(shape)}: it is [B, T], true for "
            "tokens and false for padding; which tokens see later ones is the layer's `causal`"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"a mask must be bool, true for tokens and false for padding, got {mask.dtype}; "
            "attention.from_key_padding_mask reads PyTorch's masks, whose padding is true or -inf"
        )


def _got(x: Tensor) -> str:
    return f"got {tuple(x.shape)}"

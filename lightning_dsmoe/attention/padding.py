"""Masks of padding as PyTorch's own attention takes them.

Shapes: B sequences in a batch, T positions.
"""

import torch
from torch import Tensor


def from_key_padding_mask(key_padding_mask: Tensor) -> Tensor:
    """The mask of this library from that of PyTorch, which is true or -inf for padding.

    `nn.MultiheadAttention` and `nn.TransformerEncoder` call it `key_padding_mask` and
    `src_key_padding_mask`. No type tells the two apart, so it is never done by itself.

    Args:
        key_padding_mask: `[B, T]`, bool and true for padding, or floats, 0 for tokens and -inf for
            padding.

    Returns:
        Bool `[B, T]`, true for tokens and false for padding.

    Raises:
        ValueError: if it is of another shape or type, or has values other than these.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.attention import from_key_padding_mask
        >>> from_key_padding_mask(torch.tensor([[False, False, True]]))
        tensor([[ True,  True, False]])
        >>> from_key_padding_mask(torch.tensor([[0.0, 0.0, float("-inf")]]))
        tensor([[ True,  True, False]])
    """
    if key_padding_mask.ndim != 2:
        raise ValueError(f"a key_padding_mask must be [B, T], got {tuple(key_padding_mask.shape)}")
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    if not key_padding_mask.is_floating_point():
        raise ValueError(f"a key_padding_mask is bool or floats, got {key_padding_mask.dtype}")
    padding_BT = key_padding_mask == float("-inf")
    if not (padding_BT | (key_padding_mask == 0)).all():
        raise ValueError("a key_padding_mask of floats must be 0 for tokens and -inf for padding")
    return ~padding_BT

"""Tokens that count and tokens that do not."""

from torch import Tensor

from lightning_dsmoe.precision import at_least_float32


def flatten_tokens(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Put tokens in one dimension, at least float32, with a weight of 0 or 1 for each.

    Args:
        values: `[..., E]`.
        mask: `[...]`, bool or 0/1; None counts all.

    Returns:
        Values `[N, E]` and weights `[N]`.

    Raises:
        ValueError: if the mask does not cover the tokens.
    """
    values = at_least_float32(values)
    if mask is None:
        mask = values.new_ones(values.shape[:-1])
    elif mask.shape != values.shape[:-1]:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} for tokens of shape {tuple(values.shape[:-1])}"
        )
    return values.reshape(-1, values.shape[-1]), mask.reshape(-1).to(values)

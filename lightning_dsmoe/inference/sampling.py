"""Sampling a token from logits.

Shapes: B sequences in a batch, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_COLDEST, _HOTTEST = 1e-6, 1e6  # beyond which probabilities are no numbers in float32


@dataclass(frozen=True)
class Sampler:
    """Draws one token for each row of logits; a logit of minus infinity rules a token out.

    `top_k` applies before the temperature, `top_p` to the probabilities of what `top_k` leaves.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only; of equal ones the first.
        top_p: sample from the fewest most probable tokens that hold this much probability only.
        generator: source of randomness, for repeatable samples.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> sampler = Sampler(temperature=0)
        >>> sampler(torch.tensor([[0.1, 0.7, 0.2], [3.0, 1.0, 2.0]]))
        tensor([1, 0])
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        temperature, top_k, top_p = self.temperature, self.top_k, self.top_p
        if not isinstance(temperature, int | float):
            raise ValueError(f"temperature must be a number, got {temperature!r}")
        if temperature != 0 and not _COLDEST <= temperature <= _HOTTEST:
            raise ValueError(
                f"temperature must be 0 or from {_COLDEST:g} to {_HOTTEST:g}, got {temperature}"
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Tokens `[B]` from logits `[B, V]`.

        Raises:
            FloatingPointError: if logits are NaN or infinite, or rule out all tokens.
        """
        if self.temperature == 0:
            highest_B, tokens_B = logits_BV.max(-1)
            # A NaN is larger than any number, so the largest logit shows all that is not finite.
            if not all(map(math.isfinite, highest_B.tolist())):
                raise _not_finite()
            return tokens_B
        logits_BV = logits_BV.float()
        order_BV = None
        if self.top_k is not None and self.top_k < logits_BV.shape[-1]:
            logits_BV = logits_BV.masked_fill(~_largest(logits_BV, self.top_k), -torch.inf)
        if self.top_p is not None:
            logits_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        # The largest is subtracted first: divided by a small temperature, logits would overflow.
        probs_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if self.top_p is not None:
            dropped_BV = probs_BV.cumsum(-1) - probs_BV >= self.top_p
            dropped_BV[:, 0] = False
            probs_BV = probs_BV.masked_fill(dropped_BV, 0.0)
        try:
            place_B1 = torch.multinomial(probs_BV, 1, generator=self.generator)
        except RuntimeError:  # it looks for NaN itself, so looking here would only cost time
            if probs_BV.isfinite().all():
                raise
            raise _not_finite() from None
        return (place_B1 if order_BV is None else order_BV.gather(-1, place_B1)).squeeze(-1)


def _not_finite() -> FloatingPointError:
    return FloatingPointError(
        "the logits are not finite: weights hold NaN or infinity, or products of them overflow"
    )


def _largest(logits_BV: Tensor, k: int) -> Tensor:
    """The k largest of each row; of equal ones those of lower number."""
    least_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    # Not `>`, which is false for a NaN: it would be masked here and the model's fault stay hidden.
    above_BV, equal_BV = ~(logits_BV <= least_B1), logits_BV == least_B1
    return above_BV | (equal_BV & (equal_BV.cumsum(-1) <= k - above_BV.sum(-1, keepdim=True)))

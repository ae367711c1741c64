"""What occurs with an expert more often than by chance: tokens that it likes, and other experts.

Shapes: V vocabulary, E experts, U frequent tokens, P pairs of experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED

LEAST_COUNT = 20
"""Tokens of a text that occur less often say little of an expert."""
_LEAST_LIFT = 1.05  # what is closer to 1 may be rounding


class FrequentTokens(NamedTuple):
    """Tokens that occur often in a text, ascending, and how often; both int64 `[U]`."""

    numbers_U: Tensor
    counts_U: Tensor

    def rows(self, vocab_size: int) -> Tensor:
        """Place of each token of the vocabulary among them, `[V]`; U for those not among them."""
        row_V = torch.full((vocab_size,), len(self.numbers_U))
        row_V[self.numbers_U] = torch.arange(len(self.numbers_U))
        return row_V


class TokenLift(NamedTuple):
    """A token that an expert likes.

    `lift` is the expert's mean gate on that token as a multiple of its mean gate on all tokens.
    """

    token: int
    lift: float
    occurrences: int


def frequent_tokens(text: HeldOut, least: int = LEAST_COUNT) -> FrequentTokens:
    """The tokens that a model reads at least so many times in a text."""
    read = [inputs_BT[labels_BT != IGNORED] for inputs_BT, labels_BT in text.batches]
    numbers, counts = torch.cat(read).cpu().unique(return_counts=True)
    often = counts >= least
    return FrequentTokens(numbers[often], counts[often])


def over_represented(
    token_gates_UE: Tensor, share_E: Tensor, frequent: FrequentTokens, most: int
) -> list[list[TokenLift]]:
    """For each expert the tokens of the highest lift above 1, at most so many.

    Args:
        token_gates_UE: mean gate of each expert on each frequent token.
        share_E: mean gate of each expert on all tokens; an expert without any likes nothing.
        frequent: the tokens.
        most: tokens of an expert.
    """
    tiny = torch.finfo(share_E.dtype).tiny
    lift_UE = token_gates_UE / share_E.clamp_min(tiny)
    order_UE = lift_UE.argsort(dim=0, descending=True, stable=True)[:most]
    return [
        [
            TokenLift(int(frequent.numbers_U[row]), lift.item(), int(frequent.counts_U[row]))
            for row, lift in zip(order_U, lift_UE[order_U, expert], strict=True)
            if lift > _LEAST_LIFT
        ]
        for expert, order_U in enumerate(order_UE.T)
    ]


class ExpertPair(NamedTuple):
    """Two experts of a layer that run together.

    `share` is that of the tokens for which both run, `lift` what it is a multiple of: the share if
    each ran as often as it does but regardless of the other.
    """

    first: int
    second: int
    share: float
    lift: float


def strongest_pairs(together_EE: Tensor, most: int) -> list[ExpertPair]:
    """The pairs of experts that run together for most tokens, at most so many.

    Args:
        together_EE: share of the tokens for which two experts both run; the diagonal says how often
            each one runs.
        most: pairs.
    """
    n_experts, running_E = len(together_EE), together_EE.diagonal()
    first_P, second_P = torch.triu_indices(n_experts, n_experts, offset=1)
    share_P = together_EE[first_P, second_P]
    order_P = share_P.argsort(descending=True, stable=True)[:most]
    chance_P = running_E[first_P] * running_E[second_P]
    return [
        ExpertPair(
            int(first_P[pair]),
            int(second_P[pair]),
            share_P[pair].item(),
            (share_P[pair] / chance_P[pair]).item(),
        )
        for pair in order_P
        if share_P[pair] > 0
    ]

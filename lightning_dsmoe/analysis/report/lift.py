"""Lift: how many times as often something occurs with an expert as it would by chance.

Tokens of an expert and pairs of experts are both ranked by it. Shapes: V vocabulary, E experts,
U frequent tokens, P pairs of experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED

LEAST_COUNT = 20
"""Tokens with fewer occurrences are left out, since their lift is mostly noise."""
_LEAST_LIFT = 1.05  # closer to 1 may be rounding


class FrequentTokens(NamedTuple):
    """Tokens that occur often in a text, in ascending order.

    Args:
        numbers_U: token numbers, int64.
        counts_U: occurrences of each token, int64.
    """

    numbers_U: Tensor
    counts_U: Tensor

    def rows(self, vocab_size: int) -> Tensor:
        """Index in `numbers_U` of every token of the vocabulary, `[V]`; U if it is not in there."""
        row_V = torch.full((vocab_size,), len(self.numbers_U))
        row_V[self.numbers_U] = torch.arange(len(self.numbers_U))
        return row_V


class TokenLift(NamedTuple):
    """A token that is over-represented at an expert.

    Args:
        token: token number.
        lift: mean gate of the expert on that token, divided by its mean gate on all tokens.
        occurrences: how often the token occurs in the text.
    """

    token: int
    lift: float
    occurrences: int


class ExpertPair(NamedTuple):
    """Two experts of a layer that run for the same tokens.

    Args:
        first: number of the one.
        second: number of the other.
        share: share of the tokens for which both run.
        lift: `share` divided by the product of the shares of the tokens for which each one runs; 1
            if they run independently.
    """

    first: int
    second: int
    share: float
    lift: float


def frequent_tokens(text: HeldOut, least: int = LEAST_COUNT) -> FrequentTokens:
    """The input tokens with at least `least` occurrences in a text."""
    read = [inputs_BT[labels_BT != IGNORED] for inputs_BT, labels_BT in text.batches]
    numbers, counts = torch.cat(read).cpu().unique(return_counts=True)
    often = counts >= least
    return FrequentTokens(numbers[often], counts[often])


def over_represented(
    token_gates_UE: Tensor, share_E: Tensor, frequent: FrequentTokens, most: int
) -> list[list[TokenLift]]:
    """The most over-represented tokens of each expert: up to `most` with the highest lift above 1.

    Args:
        token_gates_UE: mean gate of each expert on each frequent token.
        share_E: mean gate of each expert on all tokens.
        frequent: the frequent tokens.
        most: most tokens of an expert.
    """
    lift_UE = token_gates_UE / share_E.clamp_min(torch.finfo(share_E.dtype).tiny)
    lift_UE, row_UE = lift_UE.sort(dim=0, descending=True, stable=True)
    numbers, counts = frequent.numbers_U.tolist(), frequent.counts_U.tolist()
    return [
        [
            TokenLift(numbers[row], lift, counts[row])
            for lift, row in zip(lift_U, row_U, strict=True)
            if lift > _LEAST_LIFT
        ]
        for lift_U, row_U in zip(lift_UE[:most].T.tolist(), row_UE[:most].T.tolist(), strict=True)
    ]


def strongest_pairs(together_EE: Tensor, most: int) -> list[ExpertPair]:
    """Up to `most` pairs of experts that run together for the largest share of the tokens.

    Args:
        together_EE: share of the tokens for which two experts both run; on the diagonal the share
            for which each one runs.
        most: most pairs.
    """
    n_experts, running_E = len(together_EE), together_EE.diagonal()
    first_P, second_P = torch.triu_indices(n_experts, n_experts, offset=1)
    share_P = together_EE[first_P, second_P]
    lift_P = share_P / (running_E[first_P] * running_E[second_P])
    order_P = share_P.argsort(descending=True, stable=True)[:most]
    columns = [column_P[order_P].tolist() for column_P in (first_P, second_P, share_P, lift_P)]
    return [ExpertPair(*pair) for pair in zip(*columns, strict=True) if pair[2] > 0]

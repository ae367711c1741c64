"""Experts of a layer that run together.

Shapes: P pairs of experts.
"""

from typing import NamedTuple

import torch

from lightning_dsmoe.analysis.report.utilization import RouterUse


class Pair(NamedTuple):
    """Two experts of a layer that run together.

    `share` is that of the tokens for which both run, `lift` what it is a multiple of: the share if
    each ran as often as it does but regardless of the other.
    """

    first: int
    second: int
    share: float
    lift: float


def strongest_pairs(use: RouterUse, most: int) -> list[Pair]:
    """The pairs of experts that run together for most tokens, at most so many."""
    n_experts = len(use.together_NN)
    first_P, second_P = torch.triu_indices(n_experts, n_experts, offset=1)
    share_P = use.together_NN[first_P, second_P]
    order_P = share_P.argsort(descending=True, stable=True)[:most]
    chance_P = use.running_N[first_P] * use.running_N[second_P]
    return [
        Pair(
            int(first_P[pair]),
            int(second_P[pair]),
            share_P[pair].item(),
            (share_P[pair] / chance_P[pair]).item(),
        )
        for pair in order_P
        if share_P[pair] > 0
    ]

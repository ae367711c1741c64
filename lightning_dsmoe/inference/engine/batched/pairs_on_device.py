"""Sorting (token, expert) pairs by expert on the device, with no size that depends on the data.

On a GPU a size that the data decide has to be waited for: everything queued before it must end, and
nothing after it is queued meanwhile. Here all sizes are known beforehand, from the selection.

Shapes: N tokens, E experts, K active experts, at most, of one token, P (token, expert) pairs, those
that do not run and one spare pair at the end included.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.routing import AllExperts, Selection, Threshold, ThresholdTopK, TopK, TopP

_ROUNDING = 1e-3  # of probabilities that add up to 1, in whatever type; more than any rounds by


class PairsOnDevice(NamedTuple):
    """Which token runs which expert under which gate, in the order in which they run.

    The last pair is spare: it stands for experts that a token does not run, and leaves the end of
    the last expert below P, as `torch.nn.functional.grouped_mm` asks for. What stands from that end
    on runs nowhere and holds any token.

    Shape:
        token_P: token of each pair.
        expert_P: its expert.
        gate_P: its gate.
        place_NK: the pairs of each token, by expert; the spare one for those that it lacks.
        ends_E: int32, where the pairs of each expert end.
    """

    token_P: Tensor
    expert_P: Tensor
    gate_P: Tensor
    place_NK: Tensor
    ends_E: Tensor


def most_experts(selection: Selection, n_experts: int) -> int | None:
    """The most experts that a selection may run for one token; None if its kind is not known.

    Probabilities add up to 1, so at most E / eps of them are above eps / E.

    Args:
        selection: the selection.
        n_experts: experts E that the router scores.

    Examples:
        >>> from lightning_dsmoe import Threshold, TopK
        >>> [most_experts(rule, 32) for rule in (TopK(4), Threshold(4.0), Threshold(0.48))]
        [4, 8, 32]
    """
    if type(selection) is TopK:
        return selection.k
    if type(selection) is Threshold or type(selection) is ThresholdTopK:
        most = n_experts / max(selection.eps, 1.0) * (1 + _ROUNDING)
        return min(n_experts, math.floor(most))
    if type(selection) is TopP:
        return min(n_experts, math.floor(n_experts * selection.p * (1 + _ROUNDING)) + 1)
    return n_experts if type(selection) is AllExperts else None


def sort_on_device(
    gates_NE: Tensor, active_NE: Tensor, *, n_pairs: int, most: int
) -> PairsOnDevice:
    """Sort (token, expert) pairs by expert, and those of one expert by token.

    Args:
        gates_NE: gate of each expert.
        active_NE: the experts that run, bool.
        n_pairs: at least as many as run.
        most: the most experts K of a token, at least as many as run for any.
    """
    n_tokens, n_experts = active_NE.shape
    # Row by row, the transposed mask lists pairs in the wanted order: counting them places them.
    active_EN = active_NE.T
    counted_EN = active_EN.flatten().cumsum(0).view(n_experts, n_tokens)
    place_EN = torch.where(active_EN, counted_EN - 1, n_pairs)
    # Experts that do not run all write to the spare pair; whichever is the last, nobody reads it.
    pair_P = counted_EN.new_zeros(n_pairs + 1)
    every_pair = torch.arange(n_experts * n_tokens, device=active_NE.device)
    pair_P.scatter_(0, place_EN.flatten(), every_pair)
    token_P, expert_P = pair_P % n_tokens, pair_P // n_tokens
    return PairsOnDevice(
        token_P,
        expert_P,
        gates_NE[token_P, expert_P],
        place_EN.T.topk(most, dim=1, largest=False).values,
        # Of one expert too the stride must be 1, which PyTorch 2.15 asks for.
        counted_EN[:, -1].to(torch.int32, memory_format=torch.contiguous_format),
    )

"""The experts that the new tokens of a few sequences need, in slots whose number is a constant.

A CUDA graph has constant shapes, and a number that the host would have to read stops the GPU. So
there are as many slots as experts can be needed, and how many of them are is told on the device.

Shapes: B sequences, one token of each; E experts (those that were not removed), K slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.routing import AllExperts, Routing, Selection, TopK
from lightning_dsmoe.routing.removed import remaining_mask, remaining_probs, select


class ExpertSlots(NamedTuple):
    """The experts that run, in the first of K slots, and their gates.

    Shape:
        experts_K: int64, the expert in each slot, ascending; those of unused slots repeat the last
            one that runs, which has been read then.
        gates_KB: gate of each for each token; zero in unused slots and where a token does not run
            it.
        n_active_1: int64, the number of slots in use.
    """

    experts_K: Tensor
    gates_KB: Tensor
    n_active_1: Tensor


def all_slots(gates_EB: Tensor) -> ExpertSlots:
    """Every expert in a slot of its own."""
    numbers_E = torch.arange(len(gates_EB), device=gates_EB.device)
    return ExpertSlots(numbers_E, gates_EB, numbers_E[-1:] + 1)


def choose_slots(
    selection: Selection, routing: Routing, remaining: Tensor | None = None
) -> ExpertSlots:
    """Apply a selection to the routing of a few tokens, all on the device.

    Args:
        selection: the selection.
        routing: output of the router.
        remaining: the experts that were not removed, among which all are numbered; None for all.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.inference.engine.decode_cuda.expert_slots import choose_slots
        >>> from lightning_dsmoe.routing import Routing, Threshold
        >>> probs = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]])
        >>> slots = choose_slots(Threshold(1.3), Routing(probs.log(), probs))
        >>> slots.experts_K, slots.n_active_1
        (tensor([0, 1, 1]), tensor([2]))
        >>> slots.gates_KB
        tensor([[0.0000, 0.5000],
                [0.7000, 0.0000],
                [0.0000, 0.0000]])
    """
    if isinstance(selection, AllExperts):
        return all_slots(select(selection, routing, remaining).weight.T)
    active_BE = remaining_mask(selection, routing, remaining)
    gates_BE = selection.weigh(remaining_probs(selection, routing, remaining), active_BE)
    n_tokens, n_experts = active_BE.shape
    most = n_tokens * selection.k if type(selection) is TopK else n_experts
    active_E = active_BE.any(0)
    n_active_1 = active_E.sum(0, keepdim=True)
    # An active expert's slot is the number of those before it. Comparisons and sums fuse into one
    # kernel; `nonzero` has a size that the host would wait for, and a sort is a kernel by itself.
    numbers_E = torch.arange(n_experts, device=active_E.device)
    slot_E = (active_E & (numbers_E < numbers_E[:, None])).sum(-1)
    slots_K = torch.arange(min(most, n_experts), device=active_E.device)
    is_in_slot_KE = (slot_E == slots_K.minimum(n_active_1 - 1)[:, None]) & active_E
    experts_K = torch.where(is_in_slot_KE, numbers_E, 0).sum(-1)
    gates_KB = gates_BE.T[experts_K] * (slots_K < n_active_1)[:, None]
    return ExpertSlots(experts_K, gates_KB, n_active_1)

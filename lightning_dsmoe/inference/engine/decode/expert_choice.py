"""The experts that the new tokens of a few sequences need together.

Shapes: B sequences, one token of each; E experts (those that were not removed), K active experts.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.decode.selection_inputs import SlotsInput
from lightning_dsmoe.inference.engine.weights.matvec import materialize
from lightning_dsmoe.routing import AllExperts, Routing, Selection, TopK
from lightning_dsmoe.routing.removed import remaining_mask, remaining_probs, select
from lightning_dsmoe.routing.selection import rank

# `torch.export` takes the sizes 0 and 1 for constants: a graph for any number of experts is one for
# two or more.
_MIN_DYNAMIC_SIZE = 2


class ChosenExperts(NamedTuple):
    """The experts that run, and their gates.

    Shape:
        experts_K: numbers of the experts that any token runs; None for all. A single one can stand
            twice, the second time under gates of zero.
        gates_KB: gate of each of them for each token, zero where a token does not run it.
    """

    experts_K: Tensor | None
    gates_KB: Tensor


def choose_experts(
    selection: Selection, routing: Routing, remaining: Tensor | None = None
) -> ChosenExperts:
    """Apply a selection to the routing of a few tokens.

    The number of active experts is known beforehand for one token and `TopK`; otherwise it depends
    on the probabilities, so that no more weights are read than are needed.

    Args:
        selection: the selection.
        routing: output of the router.
        remaining: the experts that were not removed, among which all are numbered; None for all.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.inference.engine.decode.expert_choice import choose_experts
        >>> from lightning_dsmoe.routing import Routing, TopK
        >>> probs = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]])
        >>> choose_experts(TopK(1), Routing(probs.log(), probs))
        ChosenExperts(experts_K=tensor([0, 1]), gates_KB=tensor([[0.0000, 0.5000],
                [0.7000, 0.0000]]))
    """
    if isinstance(selection, AllExperts):
        return ChosenExperts(None, select(selection, routing, remaining).weight.T)
    probs_BE = remaining_probs(selection, routing, remaining)
    n_tokens, n_experts = probs_BE.shape
    if n_tokens == 1 and (isinstance(selection, SlotsInput) or type(selection) is TopK):
        logits_BE = routing.logits if remaining is None else routing.logits[:, remaining]
        return _choose_top_k(selection, Routing(logits_BE, probs_BE))
    active_BE = materialize(remaining_mask(selection, routing, remaining))
    gates_BE = materialize(selection.weigh(probs_BE, active_BE))
    active_E = active_BE.any(0)
    n_active = active_E.sum()
    # K becomes a size that the kernel reads at run time: loops over experts end there. The checks
    # give its bounds, which the graph does not show: export ends where it has to compare K with a
    # constant and cannot tell the answer.
    n_slots = n_active.clamp_min(_MIN_DYNAMIC_SIZE).item()
    torch._check(n_slots >= _MIN_DYNAMIC_SIZE)
    torch._check(n_slots <= max(n_experts, _MIN_DYNAMIC_SIZE))
    # `active_E.nonzero()` would be a call that nothing fuses with, and has a size of its own that
    # the compiler does not know to be K. Instead each active expert counts those before it, which
    # is its slot, and each slot takes the number of the expert that has it: sums over comparisons.
    # Sorting was not faster; choosing takes 25 microseconds a layer of 256 experts
    # (docs/lab_notes/decoding.md).
    numbers_E = torch.arange(n_experts, device=probs_BE.device)
    slot_E = materialize((active_E & (numbers_E < numbers_E[:, None])).sum(-1))
    slots_K = torch.arange(n_slots, device=probs_BE.device)
    is_in_slot_KE = (slot_E == slots_K.minimum(n_active - 1)[:, None]) & active_E
    experts_K = materialize(torch.where(is_in_slot_KE, numbers_E, 0).sum(-1))
    # A second slot that no expert needs repeats the first expert, which must not count twice.
    gates_KB = materialize(gates_BE.T[experts_K] * (slots_K < n_active)[:, None])
    return ChosenExperts(experts_K, gates_KB)


def _choose_top_k(selection: Selection, routing: Routing) -> ChosenExperts:
    """The k most probable experts of one token.

    They are ranked by logits, which are known before the softmax and have the same order. Ranks are
    the slots, so that K = k is known beforehand and nothing has to be counted.
    """
    rank_E = materialize(rank(routing.logits)[0])
    if isinstance(selection, SlotsInput):
        slots_K = selection.slots_K
    else:
        slots_K = torch.arange(cast(TopK, selection).k, device=rank_E.device)
    is_in_slot_KE = rank_E == slots_K[:, None]
    numbers_E = torch.arange(len(rank_E), device=rank_E.device)
    experts_K = materialize(torch.where(is_in_slot_KE, numbers_E, 0).sum(-1))
    gates_K1 = materialize(torch.where(is_in_slot_KE, routing.probs, 0.0).sum(-1, keepdim=True))
    return ChosenExperts(
        experts_K, gates_K1 / gates_K1.sum() if selection.renormalize else gates_K1
    )

"""Selections whose numbers are inputs of a kernel, so that another k or eps needs no new kernel.

The number is a buffer, which a kernel takes as it takes weights.

Shapes: E experts, K active experts; leading dimensions are free.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from lightning_dsmoe.inference.engine.decode.aot_cache import tensors_of
from lightning_dsmoe.routing import Gates, Selection, Threshold, ThresholdTopK, TopK, TopP
from lightning_dsmoe.routing.selection import (
    above_threshold,
    mean_number_above_threshold,
    rank,
    shortest_prefix,
)


def with_inputs(selection: Selection, n_tokens: int) -> Selection:
    """A selection with its number as an input, or itself where the number is part of the graph.

    What is returned is no `Selection` by class but chooses as one does.

    Args:
        selection: the selection.
        n_tokens: tokens in a step.

    Examples:
        >>> from lightning_dsmoe.inference.engine.decode.selection_inputs import with_inputs
        >>> from lightning_dsmoe.routing import AllExperts, Threshold, TopK
        >>> with_inputs(Threshold(0.5), 1).number
        tensor(0.5000, dtype=torch.float64)
        >>> with_inputs(TopK(3), 1).slots_K
        tensor([0, 1, 2])
        >>> with_inputs(AllExperts(), 1)
        AllExperts(renormalize=False)
    """
    # Exact classes: a subclass may have a `mask` of its own.
    if type(selection) is TopK and n_tokens == 1:
        # Sizes of 1 are constants of a graph.
        return cast(Selection, SlotsInput(selection)) if selection.k > 1 else selection
    found: NumberInput | None = None
    if type(selection) is TopK:
        found = NumberInput(selection, selection.k, _top_k)
    elif type(selection) is Threshold:
        found = NumberInput(selection, selection.eps, above_threshold)
    elif type(selection) is ThresholdTopK:
        found = NumberInput(selection, selection.eps, mean_number_above_threshold)
    elif type(selection) is TopP and selection.p < 1:  # all experts have a graph of their own
        found = NumberInput(selection, selection.p, shortest_prefix)
    return selection if found is None else cast(Selection, found)


class NumberInput(nn.Module):
    """A selection with its number as a buffer.

    Args:
        selection: the selection.
        number: its number.
        mask_of: its mask, from probabilities and the number.
    """

    number: Tensor

    def __init__(
        self, selection: Selection, number: float, mask_of: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.renormalize = selection.renormalize
        self.mask_of = mask_of
        # On the CPU whatever the default device is: kernels are made for CPUs.
        # Compared with float32 numbers, a float64 of no dimension is rounded to float32 first, as
        # Python's numbers are.
        dtype = torch.long if isinstance(number, int) else torch.float64
        self.register_buffer("number", torch.tensor(number, dtype=dtype, device="cpu"))

    def mask(self, probs: Tensor) -> Tensor:
        """The experts that run, bool `[..., E]`."""
        return self.mask_of(probs, self.number)

    def weigh(self, probs: Tensor, active: Tensor) -> Tensor:
        """Gates `[..., E]`."""
        weight = probs.masked_fill(~active, 0.0)
        return weight / weight.sum(-1, keepdim=True) if self.renormalize else weight

    def forward(self, probs: Tensor) -> Gates:
        """Gates of the experts that run."""
        active = self.mask(probs)
        return Gates(self.weigh(probs, active), active)


class SlotsInput(nn.Module):
    """`TopK` for one token, with its k as the size of a buffer, the numbers of K slots.

    Args:
        selection: the selection, with a k of two or more.
    """

    slots_K: Tensor

    def __init__(self, selection: TopK) -> None:
        super().__init__()
        self.renormalize = selection.renormalize
        self.register_buffer("slots_K", torch.arange(selection.k, device="cpu"))

    def forward(self, probs: Tensor) -> Gates:
        """Not called: ranks are enough."""
        raise NotImplementedError


def free_sizes(module: nn.Module) -> frozenset[int]:
    """Numbers, among `tensors_of` a module, of those whose first size is free."""
    slots = {id(each.slots_K) for each in module.modules() if isinstance(each, SlotsInput)}
    return frozenset(i for i, tensor in enumerate(tensors_of(module)) if id(tensor) in slots)


def _top_k(probs: Tensor, k: Tensor) -> Tensor:
    return rank(probs) < k

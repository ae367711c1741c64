"""Which experts a text never uses, and the proof that pruning them changes nothing on it.

Shapes: B sequences in a batch, T positions, E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.inference import Remaining, SparseModel
from lightning_dsmoe.metrics import active_masks
from lightning_dsmoe.routing import Selection, SelectionPlan, Threshold, ThresholdTopK
from lightning_dsmoe.routing.routing import Kind, block_layer_name
from lightning_dsmoe.serialization.pruning import mixtures

TOLERANCE = 2e-6
"""Largest difference of a logit that rounding explains, relative to the largest logit."""


class Proof(NamedTuple):
    """A pruned model compared with the whole one on the same text.

    Args:
        n_tokens: tokens that both read.
        n_choices: pairs of a token and an expert that run in the whole model.
        other_choices: pairs that run in one of the two models alone.
        difference: the largest difference of two logits.
        largest_logit: the largest magnitude of a logit of the whole model.
    """

    n_tokens: int
    n_choices: int
    other_choices: int
    difference: float
    largest_logit: float

    @property
    def holds(self) -> bool:
        """Whether all choices are the same, and all logits up to rounding."""
        return not self.other_choices and self.difference <= TOLERANCE * self.largest_logit


@torch.inference_mode()
def used_experts(model: SparseModel, plan: SelectionPlan, text: HeldOut) -> Remaining:
    """The experts that run for any token of a text.

    Args:
        model: the model.
        plan: the experts that run.
        text: the text, of which every token counts.

    Returns:
        The experts to keep, of each layer.
    """
    counted = _counted(plan)
    used: dict[str, Tensor] = {}
    for inputs_BT, _ in text.batches:
        routings = model(inputs_BT, plan).routings
        # ThresholdTopK runs as many experts as are above its threshold in the mean. Experts that
        # never run but add to that mean must stay, or fewer would run.
        for some in (plan, counted):
            for name, chosen in active_masks(routings, some, model.decoder).items():
                seen_E = chosen.flatten(0, -2).any(0)
                used[name] = used.get(name, seen_E) | seen_E

    def numbers(kind: Kind, layers: Sequence[object]) -> tuple[tuple[int, ...] | None, ...]:
        each = [used.get(block_layer_name(n, kind)) for n in range(len(layers))]
        return tuple(
            None if mixture is None or e is None or e.all() else tuple(e.nonzero()[:, 0].tolist())
            for mixture, e in zip(layers, each, strict=True)
        )

    experts, attention = mixtures(model.decoder)
    return Remaining(numbers("experts", experts), numbers("attention", attention))


@torch.inference_mode()
def prove(whole: SparseModel, pruned: SparseModel, plan: SelectionPlan, text: HeldOut) -> Proof:
    """Run a text through both models and compare all choices of experts and all logits."""
    n_tokens = n_choices = other_choices = 0
    differences, largest = [], []
    for inputs_BT, _ in text.batches:
        expected, routings = whole(inputs_BT, plan)
        actual, other_routings = pruned(inputs_BT, plan)
        differences.append((actual - expected).abs().max())
        largest.append(expected.abs().max())
        n_tokens += inputs_BT.numel()
        running = active_masks(routings, plan, whole.decoder)
        for name, other in active_masks(other_routings, plan, pruned.decoder).items():
            n_choices += int(running[name].sum())
            other_choices += int((running[name] != other).sum())
    return Proof(
        n_tokens,
        n_choices,
        other_choices,
        torch.stack(differences).max().item(),
        torch.stack(largest).max().item(),
    )


def _counted(plan: SelectionPlan) -> SelectionPlan:
    """The plan that runs what `ThresholdTopK` only counts."""

    def counted(selection: Selection) -> Selection:
        return Threshold(selection.eps) if isinstance(selection, ThresholdTopK) else selection

    return SelectionPlan(
        counted(plan.experts),
        counted(plan.attention),
        {name: counted(selection) for name, selection in plan.layers.items()},
    )

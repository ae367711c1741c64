"""Which experts a text never uses, and the proof that pruning them changes nothing on it.

Shapes: B sequences in a batch, T positions, E experts.
"""

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.decoder import Routings
from lightning_dsmoe.inference import Remaining, SparseModel
from lightning_dsmoe.metrics import active_masks
from lightning_dsmoe.routing import SelectionPlan, Threshold, ThresholdTopK
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
    used: list[Tensor | None] = [None] * (2 * plan.n_layers)
    for inputs_BT, _ in text.batches:
        routings = model(inputs_BT, plan).routings
        # ThresholdTopK runs as many experts as are above its threshold in the mean. Experts that
        # never run but add to that mean must stay, or fewer would run.
        for some in (plan, counted):
            for place, chosen in enumerate(_choices(model, some, routings)):
                if chosen is not None:
                    seen_E, before_E = chosen.flatten(0, -2).any(0), used[place]
                    used[place] = seen_E if before_E is None else before_E | seen_E
    numbers = [
        None
        if mixture is None or each is None or bool(each.all())
        else tuple(each.nonzero()[:, 0].tolist())
        for mixture, each in zip(chain(*mixtures(model.decoder)), used, strict=True)
    ]
    return Remaining(tuple(numbers[: plan.n_layers]), tuple(numbers[plan.n_layers :]))


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
        for one, other in zip(
            _choices(whole, plan, routings), _choices(pruned, plan, other_routings), strict=True
        ):
            if one is not None and other is not None:
                n_choices += int(one.sum())
                other_choices += int((one != other).sum())
    return Proof(
        n_tokens,
        n_choices,
        other_choices,
        torch.stack(differences).max().item(),
        torch.stack(largest).max().item(),
    )


def _choices(model: SparseModel, plan: SelectionPlan, routings: Routings) -> list[Tensor | None]:
    """The experts that run, bool `[B, T, E]` for the mixtures of both kinds and all layers."""
    experts, attention = active_masks(routings, plan, model.decoder)
    return [*experts, *attention]


def _counted(plan: SelectionPlan) -> SelectionPlan:
    """The plan that runs what `ThresholdTopK` only counts."""
    experts, attention = (
        tuple(Threshold(s.eps) if isinstance(s, ThresholdTopK) else s for s in selections)
        for selections in (plan.experts, plan.attention)
    )
    return SelectionPlan(experts, attention)

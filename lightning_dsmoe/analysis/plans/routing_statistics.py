"""Gates of every router of a model on a text, and the cost of a threshold for each.

Shapes: B sequences in a batch, T positions, N tokens that count, E experts.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.metrics import ParameterCounts
from lightning_dsmoe.routing import SelectionPlan


class RouterStatistics(NamedTuple):
    """One router on a text, all experts running.

    Args:
        probs_NE: its probabilities in descending order.
        per_expert: parameters of one of its experts.
    """

    probs_NE: Tensor
    per_expert: int

    @property
    def n_experts(self) -> int:
        """Number of experts E."""
        return self.probs_NE.shape[-1]

    def running(self, eps: float) -> Tensor:
        """Mean number of experts that `Threshold(eps)` runs."""
        above_NE = self.probs_NE * self.n_experts > eps
        return above_NE.sum(-1).clamp_min(1).double().mean()

    def dropped_mass(self, eps: float) -> Tensor:
        """Mean probability of the experts that `Threshold(eps)` does not run."""
        below_NE = self.probs_NE * self.n_experts <= eps
        below_NE[:, 0] = False
        return (self.probs_NE * below_NE).sum(-1).double().mean()


class Statistics(NamedTuple):
    """All routers of a model on a text.

    Args:
        experts: of each layer, None without a mixture of experts.
        attention: of each layer, None without a mixture of attention heads.
        always: hidden parameters that run for every token.
        hidden: all hidden parameters.
    """

    experts: list[RouterStatistics | None]
    attention: list[RouterStatistics | None]
    always: int
    hidden: int

    @property
    def routers(self) -> list[RouterStatistics | None]:
        """Those of feed-forward experts by layer, then those of attention experts."""
        return [*self.experts, *self.attention]

    @property
    def least_share(self) -> float:
        """Active share with one expert in each layer."""
        one_each = sum(router.per_expert for router in self.routers if router is not None)
        return (self.always + one_each) / self.hidden

    def share(self, thresholds: Sequence[float]) -> float:
        """Active share under thresholds, one for each router."""
        active = float(self.always)
        for router, eps in zip(self.routers, thresholds, strict=True):
            if router is not None:
                active += router.running(eps).item() * router.per_expert
        return active / self.hidden


@torch.inference_mode()
def routing_statistics(model: SparseModel, text: HeldOut, counts: ParameterCounts) -> Statistics:
    """Run all experts on a text once.

    Args:
        model: the model.
        text: the text.
        counts: parameters of the decoder before it was packed, from `count_parameters`.
    """
    dense = SelectionPlan.uniform(model.decoder.n_layers)
    sizes, n_layers = [*counts.experts, *counts.attention], len(counts.experts)
    probs: list[list[Tensor]] = [[] for _ in sizes]
    for inputs_BT, labels_BT in text.batches:
        routings = model(inputs_BT, dense).routings
        for batches, routing in zip(probs, chain(*routings), strict=True):
            if routing is not None:
                probs_NE = routing.probs[labels_BT != IGNORED].float()
                batches.append(probs_NE.sort(dim=-1, descending=True).values)
    routers = [
        None if size is None else RouterStatistics(torch.cat(batches), size.per_expert)
        for batches, size in zip(probs, sizes, strict=True)
    ]
    return Statistics(routers[:n_layers], routers[n_layers:], counts.always, counts.hidden)

"""Gates of every router of a model on data, and the cost of a threshold for each.

Shapes: N tokens that count, E experts.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lightning_dsmoe.analysis.measured import Measured
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.routing.routing import Kind


class RouterStatistics(NamedTuple):
    """One router on a text, all experts running.

    Args:
        kind: of its layer.
        probs_NE: its probabilities in descending order.
        per_expert: parameters of one of its experts.
    """

    kind: Kind
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
        layers: the routers by the names of their layers, those of feed-forward experts first.
        always: hidden parameters that run for every token.
        hidden: all hidden parameters.
    """

    layers: Mapping[str, RouterStatistics]
    always: int
    hidden: int

    @property
    def least_share(self) -> float:
        """Active share with one expert in each layer."""
        return (self.always + sum(each.per_expert for each in self.layers.values())) / self.hidden

    def of_kind(self, kind: Kind) -> Self:
        """The routers of a kind."""
        return self._replace(layers={n: r for n, r in self.layers.items() if r.kind == kind})

    def share(self, thresholds: Mapping[str, float]) -> float:
        """Active share under the thresholds of all routers."""
        active = float(self.always)
        for name, router in self.layers.items():
            active += router.running(thresholds[name]).item() * router.per_expert
        return active / self.hidden


@torch.no_grad()
def routing_statistics(on: Measured) -> Statistics:
    """Run all experts on data once.

    Raises:
        ValueError: if a routed layer of the model is not called.
    """
    batches: dict[str, list[Tensor]] = {name: [] for name in on.counts.layers}
    for reading in on.read(SelectionPlan()):
        for name, probs_NE in reading.probs_NE().items():
            batches[name].append(probs_NE.float().sort(dim=-1, descending=True).values)
    if unused := [name for name, parts in batches.items() if not parts]:
        raise ValueError(f"no batch calls {unused[0]}, so there is nothing to find a plan with")
    routers = {
        name: RouterStatistics(on.layers[name].kind, torch.cat(parts), each.per_expert)
        for (name, parts), each in zip(batches.items(), on.counts.layers.values(), strict=True)
    }
    by_kind = dict(sorted(routers.items(), key=lambda item: item[1].kind != "experts"))
    return Statistics(by_kind, on.counts.always, on.counts.hidden)

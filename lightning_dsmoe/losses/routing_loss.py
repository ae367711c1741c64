"""The losses of all routers of a model, weighted and added up.

Shapes: R routers, E experts; leading dimensions (tokens) are free.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dsmoe.losses.load_balancing import load_balancing_of
from lightning_dsmoe.losses.mutual_information import entropies_of
from lightning_dsmoe.losses.router_sums import RouterSums, joined, over_ranks, router_sums
from lightning_dsmoe.routing.layer_names import short_names
from lightning_dsmoe.routing.plan import SelectionPlan
from lightning_dsmoe.routing.routing import Kind, Routing, Routings
from lightning_dsmoe.routing.running import RoutingRecord


class RoutingLosses(NamedTuple):
    """The weighted sum of the losses of all routers, and their means for logging.

    Args:
        total: scalar, in nats.
        terms: detached scalars, means over the routers of a kind, in nats, by names such as
            "experts/mutual_information"; where asked for, also the mutual information of each
            router, by names such as "experts/layer_00/mutual_information".
    """

    total: Tensor
    terms: dict[str, Tensor]


class _Routed(NamedTuple):
    """One router: what it said, perhaps of no token, its experts that ran, tokens that count."""

    name: str
    kind: Kind
    routing: Routing
    active: Callable[[], Tensor]
    mask: Tensor | None


class RoutingLoss(nn.Module):
    """Sum over the routers of a model of alpha L_MI + beta L_balance + gamma L_z.

    A LightningModule with one as an attribute adds it to its loss; callbacks such as
    `MIWeightAnnealing` find it there and change its weights.

    Args:
        expert_mi: alpha of the feed-forward routers, the weight of `mutual_information_loss`.
        attention_mi: alpha of the attention routers.
        load_balancing: beta of every router, the weight of `load_balancing_loss`.
        router_z: gamma of every router, the weight of `router_z_loss`.

    Raises:
        ValueError: if a weight is negative or not finite.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly, RoutingLoss, record_routings
        >>> model = nn.Sequential(nn.Linear(4, 8), OutputOnly(MixtureOfExperts(8, 4, 16)))
        >>> routing_loss = RoutingLoss(expert_mi=0.02)
        >>> with record_routings(model) as record:
        ...     y = model(torch.randn(5, 4))
        >>> loss = y.square().mean() + routing_loss(record)
        >>> loss.backward()
    """

    def __init__(
        self,
        expert_mi: float = 0.02,
        attention_mi: float = 0.02,
        load_balancing: float = 0.0,
        router_z: float = 0.0,
    ) -> None:
        super().__init__()
        weights = {
            "expert_mi": expert_mi,
            "attention_mi": attention_mi,
            "load_balancing": load_balancing,
            "router_z": router_z,
        }
        wrong = [f"{n}={value}" for n, value in weights.items() if not 0 <= value < math.inf]
        if wrong:
            raise ValueError(f"loss weights must be 0 or more, got {', '.join(wrong)}")
        self.expert_mi = expert_mi
        self.attention_mi = attention_mi
        self.load_balancing = load_balancing
        self.router_z = router_z

    def forward(
        self,
        record: RoutingRecord | Routings,
        mask: Tensor | None = None,
        *,
        plan: SelectionPlan | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """The weighted sum of the losses of all routers, a scalar in nats; see `losses`."""
        return self.losses(record, mask, plan=plan, group=group).total

    def losses(
        self,
        record: RoutingRecord | Routings,
        mask: Tensor | None = None,
        *,
        plan: SelectionPlan | None = None,
        group: dist.ProcessGroup | None = None,
        by_layer: bool = False,
    ) -> RoutingLosses:
        """The weighted sum of the losses of all routers, and its terms.

        Args:
            record: that of `record_routings`, or the routings that a `Decoder` returns.
            mask: tokens that count, bool; None takes the mask of the record, or counts all.
            plan: the experts that ran, for the load-balancing loss of a decoder's routings; None
                for all. A record knows it.
            group: process group over whose tokens all means are, as in `mutual_information_loss`;
                None takes all ranks while this module is in training mode, and none otherwise.
            by_layer: also give the mutual information of each router: a mean over routers is the
                same if two of them have collapsed on different experts.

        Returns:
            The sum and its terms; a sum of 0 without any routing.

        Raises:
            ValueError: if the mask has another shape than the tokens of a layer.
            TypeError: if there is neither a record nor routings.
            RuntimeError: if the routings were recorded without gradients.
        """
        if group is None and self.training and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if isinstance(record, RoutingRecord):
            self._check_gradients(record)
            routed = _of_record(record, mask)
        elif isinstance(record, Routings):
            routed = _of_decoder(record, mask, plan or SelectionPlan())
        else:
            raise TypeError(
                "RoutingLoss needs the record of record_routings, or the routings that a Decoder "
                f"returns, got {type(record).__name__}"
            )
        if group is None:  # or else other ranks may have called what this one did not
            routed = [each for each in routed if each.routing.probs.numel()]
        alike: dict[tuple[Kind, int], list[_Routed]] = {}
        for each in routed:
            alike.setdefault((each.kind, each.routing.probs.shape[-1]), []).append(each)
        sums = over_ranks([self._sums(some) for some in alike.values()], group)
        losses = self._of_sums([(kind, each) for (kind, _), each in zip(alike, sums, strict=True)])
        if by_layer:
            losses.terms.update(_by_layer(list(alike.values()), sums))
        return losses

    def _of_sums(self, sums: Sequence[tuple[Kind, RouterSums]]) -> RoutingLosses:
        """The losses from the sums of groups of routers."""
        total = torch.zeros((), device=sums[0][1].probs.device if sums else None)
        terms = {}
        for kind, mi_weight in (("experts", self.expert_mi), ("attention", self.attention_mi)):
            of_kind = [each for name, each in sums if name == kind]
            entropies = [entropies_of(each) for each in of_kind]
            for each, (conditional_R, marginal_R) in zip(of_kind, entropies, strict=True):
                total = total - mi_weight * (marginal_R - conditional_R).sum()
                if self.load_balancing:
                    total = total + self.load_balancing * load_balancing_of(each).sum()
                if each.squared_z is not None:
                    z_R = each.squared_z / each.tokens[:, 0].clamp_min(1)
                    total = total + self.router_z * z_R.sum()
            if entropies:
                conditional_R, marginal_R = map(torch.cat, zip(*entropies, strict=True))
                terms[f"{kind}/mutual_information"] = (marginal_R - conditional_R).mean()
                terms[f"{kind}/entropy"] = conditional_R.mean()
                terms[f"{kind}/balance_entropy"] = marginal_R.mean()
        return RoutingLosses(total, {name: value.detach() for name, value in terms.items()})

    def _sums(self, routed: Sequence[_Routed]) -> RouterSums:
        """Sums of routers with as many experts, in their order."""
        of_shape: dict[torch.Size, list[int]] = {}
        for number, each in enumerate(routed):
            of_shape.setdefault(each.routing.probs.shape, []).append(number)
        rows: dict[int, RouterSums] = {}
        for numbers in of_shape.values():
            some = [routed[number] for number in numbers]
            sums = router_sums(
                torch.stack([each.routing.probs for each in some]),
                some[0].mask,
                active=torch.stack([e.active() for e in some]) if self.load_balancing else None,
                logits=torch.stack([e.routing.logits for e in some]) if self.router_z else None,
            )
            if len(of_shape) == 1:
                return sums
            rows |= {n: sums.map(lambda part, r=r: part[r, None]) for r, n in enumerate(numbers)}  # type: ignore[misc]
        return joined([rows[number] for number in range(len(routed))])

    def _check_gradients(self, record: RoutingRecord) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        for name, routing in record.routings.items():
            trained = any(p.requires_grad for p in record.layers[name].router.parameters())
            if trained and not routing.probs.requires_grad:
                raise RuntimeError(
                    f"the routing of {name} was recorded without gradients, so no loss can train "
                    "its router; activation checkpointing needs use_reentrant=False"
                )

    def extra_repr(self) -> str:
        """Weights, for `print`."""
        return (
            f"expert_mi={self.expert_mi}, attention_mi={self.attention_mi}, "
            f"load_balancing={self.load_balancing}, router_z={self.router_z}"
        )


def _by_layer(groups: Sequence[Sequence[_Routed]], sums: Sequence[RouterSums]) -> dict[str, Tensor]:
    """The mutual information of each router, from the sums of groups of them."""
    found: dict[Kind, dict[str, Tensor]] = {}
    for routed, each in zip(groups, sums, strict=True):
        conditional_R, marginal_R = entropies_of(each.map(Tensor.detach))
        information = (marginal_R - conditional_R).unbind()
        of_kind = found.setdefault(routed[0].kind, {})
        of_kind |= {one.name: value for one, value in zip(routed, information, strict=True)}
    return {
        f"{kind}/{short}/mutual_information": value
        for kind, values in found.items()
        for short, value in zip(short_names(values), values.values(), strict=True)
    }


def _of_record(record: RoutingRecord, mask: Tensor | None) -> list[_Routed]:
    mask, routings = record.mask if mask is None else mask, record.routings
    routed = []
    for name, layer in record.layers.items():
        if name in routings:
            of_tokens = record.mask_of(name, mask)
            active = partial(record.active, name)
            routed.append(_Routed(name, layer.kind, routings[name], active, of_tokens))
        else:
            device = next(layer.parameters()).device
            nothing = torch.zeros(0, layer.n_experts, device=device)
            unused = Routing(nothing, nothing)
            routed.append(_Routed(name, layer.kind, unused, nothing.bool, None))
    return routed


def _of_decoder(routings: Routings, mask: Tensor | None, plan: SelectionPlan) -> list[_Routed]:
    layers = routings.by_name()
    selections = plan.selections(layers)
    return [
        _Routed(
            name,
            layer.kind,
            layer.routing,
            partial(selections[name].mask, layer.routing.probs),
            mask,
        )
        for name, layer in layers.items()
    ]

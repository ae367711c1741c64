"""The losses of all routers of a model, weighted and added up.

Shapes: R routers, N tokens, E experts, J = R E, W sums of a router; leading dimensions (tokens) are
free.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from lightning_dsmoe.losses.mutual_information import entropy
from lightning_dsmoe.losses.token_sums import flatten_tokens, sum_over_ranks
from lightning_dsmoe.precision import at_least_float32, without_autocast
from lightning_dsmoe.routing.plan import SelectionPlan
from lightning_dsmoe.routing.routing import Kind, Routing, Routings
from lightning_dsmoe.routing.running import RoutingRecord


class RoutingLosses(NamedTuple):
    """The weighted sum of the losses of all routers, and their means for logging.

    Args:
        total: scalar, in nats.
        terms: detached scalars, means over the routers of a kind, in nats, by names such as
            "experts/mutual_information".
    """

    total: Tensor
    terms: dict[str, Tensor]


class _Routed(NamedTuple):
    """One router: what it said, if it was called, its experts that ran, and tokens that count."""

    kind: Kind
    n_experts: int
    routing: Routing | None
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
        weights = (expert_mi, attention_mi, load_balancing, router_z)
        if not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"loss weights must be 0 or more, got {weights}")
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
    ) -> RoutingLosses:
        """The weighted sum of the losses of all routers, and its terms.

        Args:
            record: that of `record_routings`, or the routings that a `Decoder` returns.
            mask: tokens that count, bool; None takes the mask of the record, or counts all.
            plan: the experts that ran, for the load-balancing loss of a decoder's routings; None
                for all. A record knows it.
            group: process group over whose tokens all means are, as in `mutual_information_loss`;
                None takes all ranks while this module is in training mode, and none otherwise.

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
        total = torch.zeros((), device=_device(routed))
        terms: dict[str, Tensor] = {}
        for kind, weight in (("experts", self.expert_mi), ("attention", self.attention_mi)):
            some = [each for each in routed if each.kind == kind]
            # With other ranks even if this one called none: they wait for its sums.
            if some and (group is not None or any(each.routing for each in some)):
                kind_total, kind_terms = self._of_kind(some, weight, group)
                total = total + kind_total
                terms |= {f"{kind}/{name}": value.detach() for name, value in kind_terms.items()}
        return RoutingLosses(total, terms)

    def _of_kind(
        self, routed: list[_Routed], mi_weight: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        # One reduction for all routers, in the order of the model: tokens of ranks may differ in
        # shape, and a layer may be called on some of them only.
        sums = torch.cat([each.flatten() for each in self._sums(routed)])
        by_router = sum_over_ranks(sums, group).split([self._width(each) for each in routed])
        total = torch.zeros((), device=sums.device)
        conditional, marginal = [], []
        for n_experts in dict.fromkeys(each.n_experts for each in routed):
            rows = [
                row
                for row, each in zip(by_router, routed, strict=True)
                if each.n_experts == n_experts
            ]
            sums_RW = torch.stack(rows)
            means_RW = sums_RW / sums_RW[:, :1].clamp_min(1)
            share_RE, conditional_R = means_RW[:, 1 : n_experts + 1], means_RW[:, n_experts + 1]
            marginal_R = entropy(share_RE)
            conditional.append(conditional_R)
            marginal.append(marginal_R)
            total = total - mi_weight * (marginal_R - conditional_R).sum()
            if self.load_balancing:
                assigned_RE = sums_RW[:, n_experts + 2 : 2 * n_experts + 2]
                assigned_RE = assigned_RE / assigned_RE.sum(-1, keepdim=True).clamp_min(1)
                balance_R = n_experts * (assigned_RE * share_RE).sum(-1)
                total = total + self.load_balancing * balance_R.sum()
            if self.router_z:
                total = total + self.router_z * means_RW[:, -1].sum()
        conditional_R, marginal_R = torch.cat(conditional), torch.cat(marginal)
        return total, {
            "mutual_information": (marginal_R - conditional_R).mean(),
            "entropy": conditional_R.mean(),
            "balance_entropy": marginal_R.mean(),
        }

    def _width(self, routed: _Routed) -> int:
        """Sums of a router: tokens, probabilities, entropies, and what further losses need."""
        return 2 + routed.n_experts * (2 if self.load_balancing else 1) + bool(self.router_z)

    def _sums(self, routed: list[_Routed]) -> list[Tensor]:
        """Sums over the tokens of each router that count, `[W]`."""
        device = _device(routed)
        sums = [torch.zeros(self._width(each), device=device) for each in routed]
        for numbers in _alike(routed):
            some = [routed[number] for number in numbers]
            n_routers = len(some)
            probs = torch.stack([_called(each).probs for each in some])
            probs_NJ, weight_N = flatten_tokens(
                rearrange(probs, "r ... e -> ... (r e)"), some[0].mask
            )
            entropy_NR = entropy(rearrange(probs_NJ, "n (r e) -> n r e", r=n_routers))
            with without_autocast(probs.device.type):
                sums_RE = rearrange(weight_N @ probs_NJ, "(r e) -> r e", r=n_routers)
                entropy_R1 = (weight_N @ entropy_NR)[:, None]
                parts = [weight_N.sum().expand(n_routers, 1), sums_RE, entropy_R1]
                if self.load_balancing:
                    active = torch.stack([each.active() for each in some])
                    active_NJ = rearrange(active, "r ... e -> (...) (r e)").to(probs_NJ)
                    parts.append(rearrange(weight_N @ active_NJ, "(r e) -> r e", r=n_routers))
                if self.router_z:
                    logits = torch.stack([_called(each).logits for each in some])
                    z_NR = rearrange(at_least_float32(logits), "r ... e -> (...) r e").logsumexp(-1)
                    parts.append((weight_N @ z_NR.square())[:, None])
                for number, row in zip(numbers, torch.cat(parts, 1), strict=True):
                    sums[number] = row
        return sums

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


def _of_record(record: RoutingRecord, mask: Tensor | None) -> list[_Routed]:
    mask, routings = record.mask if mask is None else mask, record.routings
    return [
        _Routed(
            layer.kind,
            layer.n_experts,
            routings.get(name),
            partial(record.active, name),
            record.mask_of(name, mask) if name in routings else None,
        )
        for name, layer in record.layers.items()
    ]


def _of_decoder(routings: Routings, mask: Tensor | None, plan: SelectionPlan) -> list[_Routed]:
    layers = routings.by_name()
    selections = plan.selections(layers)
    return [
        _Routed(
            layer.kind,
            layer.n_experts,
            layer.routing,
            partial(selections[name].mask, layer.routing.probs),
            mask,
        )
        for name, layer in layers.items()
    ]


def _alike(routed: list[_Routed]) -> list[list[int]]:
    """Numbers of the routers that were called, in groups whose tensors have one shape."""
    groups: dict[object, list[int]] = {}
    for number, each in enumerate(routed):
        if each.routing is not None:
            groups.setdefault(each.routing.probs.shape, []).append(number)
    return list(groups.values())


def _called(routed: _Routed) -> Routing:
    assert routed.routing is not None
    return routed.routing


def _device(routed: list[_Routed]) -> torch.device | None:
    return next((each.routing.probs.device for each in routed if each.routing), None)

"""Running any model under a plan, and recording the routings of its layers.

Shapes: B sequences in a batch, T positions, E experts, N tokens; those of a mask are the tokens'.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from lightning_dsmoe.routing import interception
from lightning_dsmoe.routing.plan import SelectionPlan, check_plan
from lightning_dsmoe.routing.removed import running_mask
from lightning_dsmoe.routing.routed_layer import RoutedLayer, is_compiled, routed_layers
from lightning_dsmoe.routing.routing import Routing
from lightning_dsmoe.routing.selection import Selection


@contextmanager
def run_plan(model: nn.Module, plan: SelectionPlan) -> Iterator[None]:
    """Run the routed layers of a model under a plan, whatever its `forward` hands to them.

    Holds for calls in this thread inside the block; of nested ones the innermost holds. If the
    model recomputes activations, keep the backward pass inside too, with one plan for each.

    Args:
        model: any module with routed layers.
        plan: the experts that run.

    Raises:
        TypeError: if the plan is no `SelectionPlan`.
        ValueError: if the model has no routed layer or is compiled, or the plan does not fit it.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly, SelectionPlan, TopK, run_plan
        >>> model = nn.Sequential(nn.Linear(4, 8), OutputOnly(MixtureOfExperts(8, 4, 16)))
        >>> with run_plan(model, SelectionPlan(experts=TopK(1))):
        ...     y = model(torch.randn(5, 4))
        >>> y.shape
        torch.Size([5, 8])
    """
    check_plan(plan)
    compiled = [
        name or "the model"
        for name, module in model.named_modules()
        if is_compiled(module) and routed_layers(module)
    ]
    if compiled:
        raise ValueError(
            f"run_plan needs a model that is not compiled, and {compiled[0]} is what torch.compile "
            "returned: give it the model that was compiled, then call either of the two"
        )
    layers = some_routed_layers("run_plan", model)
    selections = {layers[name]: each for name, each in plan.selections(layers).items()}
    with interception.opened(selections):
        yield


@contextmanager
def record_routings(model: nn.Module, mask: Tensor | None = None) -> "Iterator[RoutingRecord]":
    """Record the routings of a model whose `forward` does not return them.

    Holds for calls in this thread inside the block. What activation checkpointing computes again in
    the backward pass is not recorded again. The record holds on to the graph of the forward pass.

    Args:
        model: any module with routed layers.
        mask: tokens that count, bool, of the shape that tokens have in the routed layers, such as
            `[B, T]`; None counts all.

    Returns:
        A context manager that gives the record.

    Raises:
        ValueError: if the model has no routed layer.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly, record_routings
        >>> model = nn.Sequential(nn.Linear(4, 8), OutputOnly(MixtureOfExperts(8, 4, 16)))
        >>> with record_routings(model) as record:
        ...     y = model(torch.randn(5, 4))
        >>> record.routings["1.layer"].probs.shape
        torch.Size([5, 4])
    """
    record = RoutingRecord(some_routed_layers("record_routings", model), mask)
    with interception.opened({}, record):
        yield record


def running_plan(model: nn.Module, plan: SelectionPlan) -> SelectionPlan:
    """The plan that a model runs: that of an open `run_plan`, and otherwise its own.

    Args:
        model: any module.
        plan: its own.
    """
    if not interception.is_open:
        return plan
    layers, opened = routed_layers(model), interception.scope().selections
    if not any(layer in opened for layer in layers.values()):
        return plan
    own = plan.selections(layers)
    return SelectionPlan.of_layers(
        {name: (layer.kind, opened.get(layer, own[name])) for name, layer in layers.items()}
    )


def some_routed_layers(owner: str, model: nn.Module) -> dict[str, RoutedLayer]:
    """The routed layers of a model.

    Args:
        owner: who needs them.
        model: the model.

    Raises:
        ValueError: if there are none, naming the owner.
    """
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            f"{owner} needs one model, and DataParallel runs a copy on each of "
            f"{len(model.device_ids)} devices: use DistributedDataParallel"
        )
    if not (layers := routed_layers(model)):
        raise ValueError(
            f"{owner} needs a model with routed layers, such as MixtureOfExperts or "
            f"MixtureOfAttentionHeads; {type(model).__name__} has none"
        )
    return layers


class RoutingRecord:
    """The routings of a model's layers, as `record_routings` keeps them.

    Args:
        layers: the routed layers by name.
        mask: tokens that count; None counts all.
    """

    def __init__(self, layers: dict[str, RoutedLayer], mask: Tensor | None) -> None:
        self.layers = layers
        self.mask = mask
        self._names = {layer: name for name, layer in layers.items()}
        self._calls: dict[str, list[tuple[Routing, Selection]]] = {}

    def add(self, layer: RoutedLayer, routing: Routing, selection: Selection) -> None:
        """Take the routing of a call of a layer, if the layer is one of its own."""
        if layer in self._names:
            self._calls.setdefault(self._names[layer], []).append((routing, selection))

    @property
    def routings(self) -> dict[str, Routing]:
        """The routing of each layer that was called, by name, in the order of the model.

        A layer that was called several times has the tokens of all calls: along their first
        dimension if the others agree, otherwise as `[N, E]`.
        """
        return {name: self._routing(name) for name in self.layers if name in self._calls}

    def active_masks(self) -> dict[str, Tensor]:
        """The experts that ran, for each layer bool `[..., E]`, by name.

        Of a layer that was called on the same tokens several times, those that ran in any call. A
        layer that was not called ran no expert for any token; if none was called, there is none.
        """
        ran = {}
        for name in self._calls:
            calls = self._active(name)
            alike = len({each.shape for each in calls}) == 1
            ran[name] = torch.stack(calls).any(0) if alike else _joined(calls)
        if not ran:
            return {}
        some = next(iter(ran.values()))
        return {
            name: ran[name] if name in ran else some.new_zeros(*some.shape[:-1], layer.n_experts)
            for name, layer in self.layers.items()
        }

    def active(self, name: str) -> Tensor:
        """The experts of a layer that ran, bool, of the shape of its probabilities."""
        return _joined(self._active(name))

    def _active(self, name: str) -> list[Tensor]:
        remaining = self.layers[name].remaining
        return [running_mask(s, r, remaining) for r, s in self._calls[name]]

    def mask_of(self, name: str, mask: Tensor | None) -> Tensor | None:
        """A mask of the tokens of one call, for all tokens of a layer.

        Raises:
            ValueError: if the mask has another shape than the tokens.
        """
        if mask is None:
            return None
        calls = self._calls[name]
        for routing, _ in calls:
            if mask.shape != routing.probs.shape[:-1]:
                raise ValueError(
                    f"a mask of shape {tuple(mask.shape)}, but {name} has tokens of shape "
                    f"{tuple(routing.probs.shape[:-1])}"
                )
        return mask if len(calls) == 1 else torch.cat([mask] * len(calls))

    def _routing(self, name: str) -> Routing:
        calls = [routing for routing, _ in self._calls[name]]
        return Routing(*(_joined(list(each)) for each in zip(*calls, strict=True)))


def _joined(calls: list[Tensor]) -> Tensor:
    if len(calls) == 1:
        return calls[0]
    if calls[0].ndim > 1 and len({each.shape[1:] for each in calls}) == 1:
        return torch.cat(calls)
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in calls])

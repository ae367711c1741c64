"""Layers with a router and experts, and how to find them in any model.

Shapes: D width; leading dimensions (tokens) are free.
"""

from abc import ABC
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_dsmoe.routing import interception
from lightning_dsmoe.routing.routing import Kind, MixtureOutput
from lightning_dsmoe.routing.selection import AllExperts, Selection

_WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
"""Attributes by which PyTorch's wrappers hold a module: no part of its name."""


class RoutedLayer(nn.Module, ABC):
    """Base of layers with a router and experts: what plans, losses, callbacks and engines look for.

    `MixtureOfExperts` and `MixtureOfAttentionHeads` are such layers. A layer of your own calls its
    `router` on its tokens, applies the `selection` that it is given, and returns a `MixtureOutput`
    with the routing. Called as a module, it runs the selection of an open `run_plan` instead, and
    every open `record_routings` keeps its routing.
    """

    kind: ClassVar[Kind] = "experts"
    """Whose default of a plan, and whose weight of the mutual-information loss, holds for it."""
    default_selection: Selection | None = None
    """The experts that run in calls with no selection but `AllExperts`, the default of a call; None
    for all. Sparse models set it."""
    n_experts: int
    router: nn.Module
    remaining: Tensor | None
    """Indices of the experts that were not removed, if some were; see `inference.prune`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("remaining", None, persistent=False)

    def __call__(self, *args: Any, **kwargs: Any) -> MixtureOutput:
        """Run the layer; see `forward`."""
        # A module's global, so that compiled code is guarded by it and is never stale. In `forward`
        # it would have to be repeated by every subclass, and torch.compile ignores later hooks.
        if interception.is_open or interception.is_pinned(args):
            return interception.call(self, super().__call__, args, kwargs)
        if self.default_selection is not None:
            wanted = self.wanted(interception.selection_in(args, kwargs))
            args, kwargs = interception.with_selection(args, kwargs, wanted)
        output: MixtureOutput = super().__call__(*args, **kwargs)
        return output

    def wanted(self, given: Selection) -> Selection:
        """The selection that a call with this one means: its default means that of the layer."""
        is_default = self.default_selection is not None and type(given) is AllExperts
        return cast(Selection, self.default_selection) if is_default else given

    def parameters_by_expert(self) -> list[Tensor]:
        """Parameters `[E, ...]` with a part for each expert, which runs only where that one does.

        All others, such as those of the router, count as running for every token.
        """
        return []


class OutputOnly(nn.Module):
    """A routed layer that returns its output alone, to take the place of a layer without routing.

    Args:
        layer: the routed layer.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly, record_routings
        >>> mlp = OutputOnly(MixtureOfExperts(8, 4, 16))
        >>> model = nn.Sequential(nn.LayerNorm(8), mlp)
        >>> with record_routings(model) as record:
        ...     y = model(torch.randn(2, 3, 8))
        >>> y.shape, list(record.routings)
        (torch.Size([2, 3, 8]), ['1.layer'])
    """

    def __init__(self, layer: RoutedLayer) -> None:
        super().__init__()
        if not isinstance(layer, RoutedLayer):
            raise TypeError(
                "OutputOnly needs a routed layer, such as a MixtureOfExperts, got "
                f"{type(layer).__name__}"
            )
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Output `[..., D]` of the layer for its arguments."""
        return self.layer(*args, **kwargs).output


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """The routed layers of a model, in order, by the names that `model.named_modules()` has.

    Wrappers of PyTorch, such as `DistributedDataParallel` and that of `torch.compile`, are no part
    of a name. A layer in several places of a model has the name of the first.

    Args:
        model: any module.

    Returns:
        The layers; none for a model without.

    Examples:
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, routed_layers
        >>> model = nn.Sequential(nn.Linear(4, 8), MixtureOfExperts(8, 4, 16))
        >>> {name: layer.n_experts for name, layer in routed_layers(model).items()}
        {'1': 4}
    """
    model = unwrapped(model)
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
        for name, module in model.named_modules()
        if isinstance(module, RoutedLayer)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of PyTorch around a whole model."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif is_compiled(model):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` returned for one."""
    # Not by its class, whose module is the whole compiler.
    return isinstance(getattr(module, "_orig_mod", None), nn.Module)

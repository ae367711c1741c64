"""Parameter counts of a model, by which tokens they run for."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lightning_dsmoe.decoder import TokenHead
from lightning_dsmoe.routing.routed_layer import RoutedLayer, routed_layers, unwrapped


class RoutedParameters(NamedTuple):
    """Parameters of one layer that run only for tokens that select their expert.

    Args:
        n_experts: number of experts E.
        per_expert: parameters of one expert.
    """

    n_experts: int
    per_expert: int


class ParameterCounts(NamedTuple):
    """Parameter counts of a model.

    Hidden parameters are all but those of embeddings and of the projection to a vocabulary.

    Args:
        outside: parameters that are not hidden; shared ones count once.
        always: hidden parameters that run for every token: norms, routers, keys and values, shared
            experts, output biases, and layers without a router.
        layers: the routed layers, by name.

    Examples:
        >>> from lightning_dsmoe.metrics import ParameterCounts, RoutedParameters
        >>> counts = ParameterCounts(
        ...     outside=100, always=20, layers={"mlp": RoutedParameters(n_experts=4, per_expert=20)}
        ... )
        >>> counts.hidden
        100
    """

    outside: int
    always: int
    layers: Mapping[str, RoutedParameters]

    @property
    def hidden(self) -> int:
        """Number of hidden parameters."""
        return self.always + sum(each.n_experts * each.per_expert for each in self.layers.values())


def count_parameters(model: nn.Module, *, outside: Collection[str] = ()) -> ParameterCounts:
    """Count the parameters of a model by which tokens they run for.

    Every `nn.Embedding`, the head of a `Decoder` and the output embeddings of a model of
    transformers are outside the hidden parameters. Removed experts still count, so that active
    shares remain comparable.

    Args:
        model: any module, on any device, including meta; without routed layers all run always.
        outside: names of further modules whose parameters are not hidden, such as a classifier.

    Returns:
        The counts.

    Raises:
        ValueError: if the model has no module of a name in `outside`, or one of them has experts.

    Examples:
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly
        >>> from lightning_dsmoe.metrics import count_parameters
        >>> model = nn.Sequential(nn.Embedding(50, 16), OutputOnly(MixtureOfExperts(16, 4, 8)))
        >>> counts = count_parameters(model)
        >>> counts.layers
        {'1.layer': RoutedParameters(n_experts=4, per_expert=256)}
        >>> counts.outside + counts.hidden == sum(p.numel() for p in model.parameters())
        True
    """
    model = unwrapped(model)
    routed = {
        name: (layer, _size(layer.parameters_by_expert()))
        for name, layer in routed_layers(model).items()
    }
    layers = {
        name: RoutedParameters(layer.n_experts, size // _n_remaining(layer))
        for name, (layer, size) in routed.items()
    }
    not_hidden: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, nn.Embedding | TokenHead)
    ]
    for module in model.modules():
        output = getattr(module, "get_output_embeddings", None)  # of transformers
        if callable(output) and isinstance(head := output(), nn.Module):
            not_hidden.append(head)
    modules = dict(model.named_modules())
    for name in outside:
        if name not in modules:
            raise ValueError(f"outside: {type(model).__name__} has no module {name!r}")
        not_hidden.append(modules[name])
    by_expert = {each for layer, _ in routed.values() for each in layer.parameters_by_expert()}
    not_hidden_too = {p for module in not_hidden for p in module.parameters()}
    if by_expert & not_hidden_too:
        raise ValueError(f"outside={list(outside)} has experts, which count by the tokens they run")
    always = set(model.parameters()) - not_hidden_too - by_expert  # packed experts are buffers
    return ParameterCounts(_size(not_hidden_too), _size(always), layers)


def _n_remaining(layer: RoutedLayer) -> int:
    return layer.n_experts if layer.remaining is None else len(layer.remaining)


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)

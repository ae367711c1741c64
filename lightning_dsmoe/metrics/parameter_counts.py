"""Where the parameters of a decoder are, counted from its modules."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts


class RoutedParameters(NamedTuple):
    """Parameters of one layer that only run when their expert is selected."""

    n_experts: int
    per_expert: int


class ParameterCounts(NamedTuple):
    """Parameters of a decoder by when they run.

    Hidden parameters are those of the blocks and of the final norm.

    Args:
        outside: embeddings, table of positions and head; a tied head counts once.
        always: hidden parameters that run for every token: norms, routers, keys and values, shared
            experts, output biases, and layers without a router.
        experts: feed-forward experts of each layer, None without a mixture of experts.
        attention: attention experts of each layer, None without a mixture of attention heads.
    """

    outside: int
    always: int
    experts: tuple[RoutedParameters | None, ...]
    attention: tuple[RoutedParameters | None, ...]

    @property
    def hidden(self) -> int:
        """All hidden parameters."""
        routed = [layer for layer in self.experts + self.attention if layer is not None]
        return self.always + sum(layer.n_experts * layer.per_expert for layer in routed)


def count_parameters(decoder: Decoder) -> ParameterCounts:
    """Count the parameters of a decoder, on any device, meta too.

    Layers other than `MixtureOfExperts` and `MixtureOfAttentionHeads` count as always running.
    Experts that were removed count as if they were there, so that shares remain comparable.
    """
    experts = tuple(_routed(block.feed_forward) for block in decoder.blocks)
    attention = tuple(_routed(block.attention) for block in decoder.blocks)
    hidden = _size([*decoder.blocks.parameters(), *decoder.norm.parameters()])
    routed = sum(_size(_stacked(layer)) for block in decoder.blocks for layer in block.children())
    return ParameterCounts(
        _size(decoder.parameters()) - hidden, hidden - routed, experts, attention
    )


def _routed(layer: object) -> RoutedParameters | None:
    stacked = [tensor for tensor in _stacked(layer) if tensor is not None]
    if not stacked:
        return None
    assert isinstance(layer, MixtureOfExperts | MixtureOfAttentionHeads)
    return RoutedParameters(layer.n_experts, _size(stacked) // len(stacked[0]))


def _stacked(layer: object) -> list[Tensor | None]:
    """What a mixture has of each of its experts."""
    if isinstance(layer, MixtureOfExperts):
        return [layer.experts.w_in.weight, layer.experts.w_out.weight, layer.experts.b_in]
    if isinstance(layer, MixtureOfAttentionHeads):
        return [layer.heads.w_q.weight, layer.heads.w_o.weight, layer.heads.b_q]
    return []


def _size(parameters: Iterable[Tensor | None]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter is not None)

"""Parameter counts of a decoder, by which tokens they run for."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts


class RoutedParameters(NamedTuple):
    """Parameters of one layer that run only for tokens that select their expert.

    Args:
        n_experts: number of experts E.
        per_expert: parameters of one expert.
    """

    n_experts: int
    per_expert: int


class ParameterCounts(NamedTuple):
    """Parameter counts of a decoder.

    Hidden parameters are those of the blocks and of the final norm.

    Args:
        outside: embeddings, table of positions and head; a tied head counts once.
        always: hidden parameters that run for every token: norms, routers, keys and values, shared
            experts, output biases, and layers without a router.
        experts: feed-forward experts of each layer, None without a mixture of experts.
        attention: attention experts of each layer, None without a mixture of attention heads.

    Examples:
        >>> from lightning_dsmoe.metrics import ParameterCounts, RoutedParameters
        >>> counts = ParameterCounts(
        ...     outside=100, always=20, experts=(RoutedParameters(4, 20),), attention=(None,)
        ... )
        >>> counts.hidden
        100
    """

    outside: int
    always: int
    experts: tuple[RoutedParameters | None, ...]
    attention: tuple[RoutedParameters | None, ...]

    @property
    def hidden(self) -> int:
        """Number of hidden parameters."""
        routed = [layer for layer in self.experts + self.attention if layer is not None]
        return self.always + sum(layer.n_experts * layer.per_expert for layer in routed)


def count_parameters(decoder: Decoder) -> ParameterCounts:
    """Count the parameters of a decoder by which tokens they run for.

    Layers other than `MixtureOfExperts` and `MixtureOfAttentionHeads` count as always running.
    Removed experts still count, so that active shares remain comparable.

    Args:
        decoder: the decoder, on any device, including meta.

    Returns:
        The counts.

    Examples:
        >>> from functools import partial
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe.metrics import count_parameters
        >>> decoder = Decoder(
        ...     vocab_size=50,
        ...     d_model=16,
        ...     n_layers=1,
        ...     attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=8),
        ...     feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=8),
        ... )
        >>> counts = count_parameters(decoder)
        >>> counts.experts
        (RoutedParameters(n_experts=4, per_expert=256),)
        >>> counts.outside + counts.hidden == sum(p.numel() for p in decoder.parameters())
        True
    """
    experts = tuple(_routed(block.feed_forward) for block in decoder.blocks)
    attention = tuple(_routed(block.attention) for block in decoder.blocks)
    hidden = _size([*decoder.blocks.parameters(), *decoder.norm.parameters()])
    routed = sum(_size(_stacked(layer)) for block in decoder.blocks for layer in block.children())
    return ParameterCounts(
        _size(decoder.parameters()) - hidden, hidden - routed, experts, attention
    )


def _routed(layer: object) -> RoutedParameters | None:
    if not isinstance(layer, MixtureOfExperts | MixtureOfAttentionHeads):
        return None
    stacked = [tensor for tensor in _stacked(layer) if tensor is not None]
    return RoutedParameters(layer.n_experts, _size(stacked) // len(stacked[0]))


def _stacked(layer: object) -> list[Tensor | None]:
    """The parameters of a mixture that are stacked by expert."""
    if isinstance(layer, MixtureOfExperts):
        return [layer.experts.w_in.weight, layer.experts.w_out.weight, layer.experts.b_in]
    if isinstance(layer, MixtureOfAttentionHeads):
        return [layer.heads.w_q.weight, layer.heads.w_o.weight, layer.heads.b_q]
    return []


def _size(parameters: Iterable[Tensor | None]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter is not None)

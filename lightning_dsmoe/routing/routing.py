"""What a router says, how its probabilities become gates, and what layers and decoders return.

Shapes: E experts, D width; leading dimensions are free.
"""

from typing import Literal, NamedTuple, get_args

from torch import Tensor

GateScale = Literal["mean_one", "sum_to_one"]

Kind = Literal["experts", "attention"]
"""Of a routed layer: feed-forward experts or attention experts."""


class Routing(NamedTuple):
    """What a router makes of tokens: the scores of every expert, and their softmax.

    Shape:
        logits: float32 `[..., E]`.
        probs: float32 `[..., E]`, the softmax S of the logits; each row sums to 1.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.routing import LinearRouter
        >>> routing = LinearRouter(8, 4)(torch.randn(2, 3, 8))
        >>> routing.probs.shape
        torch.Size([2, 3, 4])
    """

    logits: Tensor
    probs: Tensor


class MixtureOutput(NamedTuple):
    """What a layer of a decoder block returns: its output and, if it has a router, its routing.

    Shape:
        output: `[..., D]`.
    """

    output: Tensor
    routing: Routing | None


class Routings(NamedTuple):
    """The routing of every block of a decoder, None for a layer without a router."""

    experts: tuple[Routing | None, ...]
    attention: tuple[Routing | None, ...]

    def by_name(self) -> "dict[str, RoutingOfLayer]":
        """The routings by the names that their layers have in a decoder, in its order."""
        return {
            block_layer_name(block, kind): RoutingOfLayer(kind, routing)
            for block, pair in enumerate(zip(self.attention, self.experts, strict=True))
            for kind, routing in zip(_KINDS_OF_BLOCK, pair, strict=True)
            if routing is not None
        }


class RoutingOfLayer(NamedTuple):
    """A routing, and the kind of layer that it is of."""

    kind: Kind
    routing: Routing

    @property
    def n_experts(self) -> int:
        """Number of experts E."""
        return self.routing.probs.shape[-1]


_KINDS_OF_BLOCK: tuple[Kind, Kind] = ("attention", "experts")
_NAME_IN_BLOCK = {"attention": "attention", "experts": "feed_forward"}


def block_layer_name(block: int, kind: Kind) -> str:
    """The name of a decoder's layer by its block and its kind.

    Examples:
        >>> block_layer_name(3, "experts")
        'blocks.3.feed_forward'
    """
    return f"blocks.{block}.{_NAME_IN_BLOCK[kind]}"


def gate_factor(gate_scale: GateScale, n_experts: int) -> float:
    """The factor c between a router's probabilities S and the gates g = c S.

    Args:
        gate_scale: "mean_one" for c = E, so that gates have a mean of 1; "sum_to_one" for c = 1.
        n_experts: number of experts E.

    Raises:
        ValueError: for any other name.
    """
    if gate_scale not in get_args(GateScale):
        raise ValueError(f"gate_scale must be one of {get_args(GateScale)}, got {gate_scale!r}")
    return float(n_experts) if gate_scale == "mean_one" else 1.0

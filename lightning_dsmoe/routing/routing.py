"""What a router says and what a routed layer returns.

Shapes: E experts, D width; leading dimensions are free.
"""

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """A router's scores for every expert.

    Shape:
        logits: float32 `[..., E]`.
        probs: float32 `[..., E]`, the softmax S of the logits; each row sums to 1.
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

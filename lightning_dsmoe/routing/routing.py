"""What a router says, how its probabilities become gates, and what a routed layer returns.

Shapes: E experts, D width; leading dimensions are free.
"""

from typing import Literal, NamedTuple, get_args

from torch import Tensor

GateScale = Literal["mean_one", "sum_to_one"]


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


def gate_factor(gate_scale: GateScale, n_experts: int) -> float:
    """c in g = c S: E for "mean_one", 1 for "sum_to_one".

    Raises:
        ValueError: for any other name.
    """
    if gate_scale not in get_args(GateScale):
        raise ValueError(f"gate_scale must be one of {get_args(GateScale)}, got {gate_scale!r}")
    return float(n_experts) if gate_scale == "mean_one" else 1.0

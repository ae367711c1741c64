"""What a router says, how its probabilities become gates, and what a routed layer returns.

Shapes: E experts, D width; leading dimensions are free.
"""

from typing import Literal, NamedTuple, get_args

from torch import Tensor

GateScale = Literal["mean_one", "sum_to_one"]


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

"""The constant by which a router's probabilities become gates."""

from typing import Literal, get_args

GateScale = Literal["mean_one", "sum_to_one"]


def gate_factor(gate_scale: GateScale, n_experts: int) -> float:
    """c in g = c S: E for "mean_one", 1 for "sum_to_one".

    Raises:
        ValueError: for any other name.
    """
    if gate_scale not in get_args(GateScale):
        raise ValueError(f"gate_scale must be one of {get_args(GateScale)}, got {gate_scale!r}")
    return float(n_experts) if gate_scale == "mean_one" else 1.0

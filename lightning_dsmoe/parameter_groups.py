"""The parameters that weight decay is for."""

from typing import Any

from torch import nn


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Group parameters for an optimizer: matrices, then norms and biases without weight decay.

    A bias is known by its name, `bias` or `b_...`, since those of all experts of a layer make a
    matrix. A group that would be empty is left out, but for that of the matrices.

    Args:
        module: the module with the parameters.
    """
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        leaf = name.rpartition(".")[2]
        is_bias = leaf == "bias" or leaf.startswith("b_")
        (rest if parameter.ndim < 2 or is_bias else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}]
    return [*groups, {"params": rest, "weight_decay": 0.0}] if rest else groups

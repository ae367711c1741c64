"""Which parameters take weight decay, and which are matrices of hidden layers."""

from typing import Any

from torch import Tensor, nn

_NOT_HIDDEN = {"embedding", "positions", "head", "router"}


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Group parameters for an optimizer: matrices, then norms and biases without weight decay.

    A group that would be empty is left out, but for that of the matrices. Parameters come with
    their names, which optimizers of PyTorch keep as `param_names`.

    Args:
        module: the module with the parameters.

    Example:
        >>> from torch import nn
        >>> from lightning_dsmoe.training.parameter_groups import parameter_groups
        >>> decayed, rest = parameter_groups(nn.Linear(2, 3))
        >>> [name for name, _ in decayed["params"]], [name for name, _ in rest["params"]]
        (['weight'], ['bias'])
        >>> rest["weight_decay"]
        0.0
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        (decayed if _is_matrix(name, parameter) else rest).append((name, parameter))
    groups: list[dict[str, Any]] = [{"params": decayed}]
    return [*groups, {"params": rest, "weight_decay": 0.0}] if rest else groups


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix between hidden layers, or a stack of them.

    Not those of embeddings and heads, whose rows are tokens, nor of routers.

    Args:
        name: its qualified name.
        parameter: the parameter.
    """
    return _is_matrix(name, parameter) and not _NOT_HIDDEN & set(name.split("."))


def _is_matrix(name: str, parameter: Tensor) -> bool:
    # A bias is known by its name, as those of all experts of a layer make a matrix.
    leaf = name.rpartition(".")[2]
    return parameter.ndim >= 2 and leaf != "bias" and not leaf.startswith("b_")

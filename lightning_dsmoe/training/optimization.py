"""How Lightning uses the optimizer and the schedule of a configuration."""

from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_NOT_HIDDEN = {"embedding", "positions", "head", "router", "shared_gate"}
_NOT_HIDDEN |= {"embed_tokens", "embed_in", "word_embeddings", "wte", "wpe", "lm_head", "embed_out"}
"""Modules by name, first the library's own, then those of transformers."""
_NORMS = {"q_norm", "k_norm"}
"""Of which those over all heads have weights of two or three dimensions."""


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Group parameters for an optimizer: matrices, then norms and biases without weight decay.

    A group that would be empty is left out, but for that of the matrices. Parameters come with
    their names, which optimizers of PyTorch keep as `param_names`.

    Args:
        module: the module with the parameters.

    Examples:
        >>> from torch import nn
        >>> from lightning_dsmoe.training.optimization import parameter_groups
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
    *path, leaf = name.split(".")
    is_vector = leaf == "bias" or leaf.startswith("b_") or not _NORMS.isdisjoint(path)
    return parameter.ndim >= 2 and not is_vector


def make_optimizer(factory: OptimizerCallable, module: nn.Module) -> Optimizer:
    """Make the optimizer of a module, with the groups of `parameter_groups`.

    Raises:
        ValueError: if it takes no stacks of matrices.
    """
    try:
        return factory(parameter_groups(module))
    except ValueError as error:
        if "only supports 2D parameters" not in str(error):  # as torch.optim.Muon says it
            raise
        raise ValueError(
            "torch.optim.Muon takes single matrices, and the weights of all experts of a layer are "
            "a stack of them: use lightning_dsmoe.optimizers.MuonWithAdamW"
        ) from None


def schedule_options(schedule: LRScheduler | ReduceLROnPlateau) -> dict[str, Any]:
    """What `configure_optimizers` returns as `lr_scheduler`.

    Lightning would step a schedule that watches a metric per step, where the metric need not be
    there yet, or per epoch, of which a run of many steps may have one: `step_plateaus` does it.

    Raises:
        ValueError: if it watches a metric and does not say which.
    """
    options: dict[str, Any] = {"scheduler": schedule, "interval": "step"}
    if not isinstance(schedule, optim.lr_scheduler.ReduceLROnPlateau):
        return options
    if not isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(
            "torch.optim.lr_scheduler.ReduceLROnPlateau does not know which metric it watches: use "
            "lightning.pytorch.cli.ReduceLROnPlateau with a monitor, such as val/loss"
        )
    return {**options, "monitor": schedule.monitor, "reduce_on_plateau": False}


def step_plateaus(trainer: Trainer) -> None:
    """Step the schedules that watch a metric.

    Raises:
        ValueError: if a metric was not logged.
    """
    for schedule in _plateaus(trainer):
        if schedule.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"ReduceLROnPlateau watches {schedule.monitor!r}, which is not logged; there are "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )
        schedule.step(trainer.callback_metrics[schedule.monitor])


def check_validated(trainer: Trainer) -> None:
    """Raise a ValueError if a schedule waits for validations, and there is none in this run."""
    if _plateaus(trainer) and not trainer.enable_validation:
        raise ValueError(
            "ReduceLROnPlateau steps after each validation, and this run has none: give it "
            "validation data, or another schedule"
        )


def _plateaus(trainer: Trainer) -> list[ReduceLROnPlateau]:
    """Those of `schedule_options`; Lightning steps others, which a subclass may have, by itself."""
    return [
        config.scheduler
        for config in trainer.lr_scheduler_configs
        if isinstance(config.scheduler, ReduceLROnPlateau) and not config.reduce_on_plateau
    ]

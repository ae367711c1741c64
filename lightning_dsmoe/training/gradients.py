"""Gradients that are finite, and clipped once."""

from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import nn
from torch.optim import Optimizer

from lightning_dsmoe.training.bad_step import StepLosses, details, gradient_norm, problem_of


def check_losses(module: LightningModule, losses: StepLosses) -> None:
    """Raise a FloatingPointError if a loss of the batches of a step is not finite."""
    if not losses.all_finite():
        problem = losses.first_not_finite(module.global_step)
        raise FloatingPointError(f"{problem}; no step was taken{details(module, losses.batch)}")


def check_and_clip(
    module: LightningModule,
    optimizer: Optimizer,
    losses: StepLosses,
    clip_val: int | float | None,
    algorithm: str | None,
) -> None:
    """Check that losses and gradients are finite, then clip them, also those of a fused optimizer.

    Lightning 2.6.6 refuses to clip for a fused optimizer under mixed precision, since some of them
    scale gradients, and would take the norm a second time: the check needs it anyway.

    Args:
        module: the module that trains.
        optimizer: its optimizer; without any gradient, as of a skipped step, nothing is checked.
        losses: those of the batches of the step.
        clip_val: largest norm or value; None for that of the Trainer.
        algorithm: "norm" or "value"; None for that of the Trainer.

    Raises:
        FloatingPointError: if a loss or a gradient is not finite.
    """
    trainer: Any = module.trainer
    norm = gradient_norm(optimizer)
    if norm is None:
        return
    if problem := problem_of(module, losses, norm):
        raise FloatingPointError(f"{problem}; no step was taken{details(module, losses.batch)}")
    clip_val = clip_val or trainer.gradient_clip_val
    if not clip_val or clip_val < 0:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    algorithm = algorithm or trainer.gradient_clip_algorithm or "norm"
    if GradClipAlgorithmType(algorithm) == GradClipAlgorithmType.VALUE:
        nn.utils.clip_grad_value_(parameters, clip_val)
    else:
        nn.utils.clip_grads_with_norm_(parameters, clip_val, norm)

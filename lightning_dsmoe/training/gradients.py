"""Gradients that are finite, and clipped once."""

from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import nn
from torch.optim import Optimizer

from lightning_dsmoe.finite import is_finite, not_finite, total_norm


def check_and_clip(
    module: LightningModule,
    optimizer: Optimizer,
    clip_val: int | float | None,
    algorithm: str | None,
) -> None:
    """Check that gradients are finite, then clip them, also those of a fused optimizer.

    Lightning 2.6.6 refuses to clip for a fused optimizer under mixed precision, since some of them
    scale gradients, and would take the norm a second time: the check needs it anyway.

    Args:
        module: the module that trains.
        optimizer: its optimizer.
        clip_val: largest norm or value; None for that of the Trainer.
        algorithm: "norm" or "value"; None for that of the Trainer.

    Raises:
        FloatingPointError: if a gradient is not finite.
    """
    trainer: Any = module.trainer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = total_norm(p.grad for p in parameters if p.grad is not None)
    if not is_finite(norm):
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        raise FloatingPointError(
            f"the gradient is not finite at step {module.global_step}, batch "
            f"{trainer.fit_loop.batch_idx} ({not_finite(gradients) or 'its norm'}); "
            "no step was taken"
        )
    clip_val = clip_val or trainer.gradient_clip_val
    if not clip_val or clip_val < 0:
        return
    algorithm = algorithm or trainer.gradient_clip_algorithm or "norm"
    if GradClipAlgorithmType(algorithm) == GradClipAlgorithmType.VALUE:
        nn.utils.clip_grad_value_(parameters, clip_val)
    else:
        nn.utils.clip_grads_with_norm_(parameters, clip_val, norm)

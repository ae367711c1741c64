"""Scalars and figures for all loggers of a trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_dsmoe.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_scalars(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Log scalars to every logger, and offer them to other callbacks as `callback_metrics`."""
    trainer.callback_metrics.update(
        {name: torch.tensor(value, dtype=torch.float32) for name, value in scalars.items()}
    )
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=trainer.global_step)


def log_figure(trainer: Trainer, name: str, figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, and send it to the loggers that take images."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, global_step=trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(key=name, images=[str(path)])

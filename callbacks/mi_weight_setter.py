"""Base of the callbacks that set the weights of the mutual-information loss."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_dsmoe.callbacks.needs import routing_loss_for
from lightning_dsmoe.callbacks.reporting import log_scalars
from lightning_dsmoe.losses import RoutingLoss

MI_WEIGHTS = {"experts": "expert_mi", "attention": "attention_mi"}
"""Attribute of a `RoutingLoss` with the weight of the mutual-information loss, by kind of layer."""


class MIWeightSetter(Callback):
    """Scales the MI weights of a `RoutingLoss` in training, and restores them at its end."""

    def __init__(self) -> None:
        self._loss: RoutingLoss | None = None
        self._configured: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        setters = [type(c).__name__ for c in callbacks if isinstance(c, MIWeightSetter)]
        if len(setters) > 1:
            raise ValueError(
                "one MIWeightAnnealing or SparsityTarget per trainer, since each sets the weights, "
                f"got {' and '.join(setters)}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._restore()

    def _remember(self, pl_module: LightningModule, kinds: Iterable[str]) -> None:
        self._loss = routing_loss_for(self, pl_module)
        self._configured = {kind: float(getattr(self._loss, MI_WEIGHTS[kind])) for kind in kinds}

    def _scale(self, factors: Mapping[str, float]) -> None:
        for kind, factor in factors.items():
            setattr(self._loss, MI_WEIGHTS[kind], factor * self._configured[kind])

    def _log(
        self, trainer: Trainer, step: int, factors: Mapping[str, float], **others: float
    ) -> None:
        """Log the scaled weights and other scalars, if loggers write this step."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0:
            for kind, factor in factors.items():
                others[f"{MI_WEIGHTS[kind]}_weight"] = factor * self._configured[kind]
            log_scalars(trainer, {f"train/{name}": value for name, value in others.items()})

    def _restore(self) -> None:
        self._scale(dict.fromkeys(self._configured, 1.0))
        self._loss, self._configured = None, {}

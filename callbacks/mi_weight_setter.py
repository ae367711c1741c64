"""Base of the callbacks that set the weights of the mutual-information loss."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_dsmoe.callbacks.reporting import log_scalars
from lightning_dsmoe.callbacks.routed_model import MI_WEIGHTS, routed_model


class MIWeightSetter(Callback):
    """Scales a model's MI weights in training, and restores them at its end."""

    def __init__(self) -> None:
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
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._restore(pl_module)

    def _remember(self, pl_module: LightningModule, kinds: Iterable[str]) -> None:
        model = routed_model(self, pl_module, *(MI_WEIGHTS[kind] for kind in kinds))
        self._configured = {kind: float(getattr(model, MI_WEIGHTS[kind])) for kind in kinds}

    def _scale(self, pl_module: LightningModule, factors: Mapping[str, float]) -> None:
        for kind, factor in factors.items():
            setattr(pl_module, MI_WEIGHTS[kind], factor * self._configured[kind])

    def _log(
        self, trainer: Trainer, step: int, factors: Mapping[str, float], **others: float
    ) -> None:
        """Log the scaled weights and other scalars, if loggers write this step."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0:
            weights = {MI_WEIGHTS[kind]: f * self._configured[kind] for kind, f in factors.items()}
            scalars = weights | others
            log_scalars(trainer, {f"train/{name}": value for name, value in scalars.items()})

    def _restore(self, pl_module: LightningModule) -> None:
        for kind, weight in self._configured.items():
            setattr(pl_module, MI_WEIGHTS[kind], weight)
        self._configured = {}

"""How routers use their experts."""

import shutil
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_dsmoe.callbacks.reporting import log_figure, log_scalars
from lightning_dsmoe.callbacks.routed_model import routed_model
from lightning_dsmoe.callbacks.run_folder import run_folder
from lightning_dsmoe.files import atomic_path
from lightning_dsmoe.metrics import DEAD_SHARE, ExpertUtilization, Utilization, utilization_figure

Meters = dict[str, list[ExpertUtilization | None]]
Utilizations = dict[str, list[Utilization | None]]


class ExpertUtilizationMonitor(Callback):
    """Logs and plots how every router uses its experts, in training and in validation.

    For each router it logs the number of effective experts, both entropies in nats, the largest
    gate share and the number of dead experts, under names such as
    `train/experts/layer_03/effective` and `val/attention/layer_00/entropy`. Each validation plots
    the gate shares of all layers, to `utilization/` in the log directory of the run and to loggers
    that take images; without validation, training plots its last report at its end.

    `results` holds the last report of "train" and of "val": for "experts" and for "attention" one
    `Utilization` per layer, None for a layer without a router.

    Args:
        every_n_steps: training batches between reports.
        window: training batches that a report covers, the last ones before it.
        dead_share: an expert is dead if its gate share is at most this fraction of an even share.

    Raises:
        ValueError: if not 1 <= window <= every_n_steps or `dead_share` not in [0, 1), and before
            the first batch if there is another ExpertUtilizationMonitor with other settings.

    Examples:
        >>> from lightning import Trainer
        >>> from lightning_dsmoe.callbacks import ExpertUtilizationMonitor
        >>> monitor = ExpertUtilizationMonitor(every_n_steps=200, window=20)
        >>> trainer = Trainer(callbacks=[monitor], logger=False, accelerator="cpu")
        >>> monitor.results  # until the first report
        {}
    """

    def __init__(
        self, *, every_n_steps: int = 100, window: int = 10, dead_share: float = DEAD_SHARE
    ) -> None:
        if not 1 <= window <= every_n_steps:
            raise ValueError(
                "window must be from 1 to every_n_steps, "
                f"got window={window}, every_n_steps={every_n_steps}"
            )
        if not 0 <= dead_share < 1:
            raise ValueError(f"dead_share must be in [0, 1), got {dead_share}")
        self.every_n_steps = every_n_steps
        self.window = window
        self.dead_share = dead_share
        self.results: dict[str, Utilizations] = {}
        self._meters: dict[str, Meters] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [each for each in callbacks if isinstance(each, ExpertUtilizationMonitor)]
        settings = {(each.every_n_steps, each.window, each.dead_share) for each in monitors}
        if len(settings) > 1:
            form = "every_n_steps={}, window={}, dead_share={}"
            listed = "; ".join(form.format(*each) for each in sorted(settings))
            raise ValueError(
                "ExpertUtilizationMonitors with different settings log under the same names, so "
                f"there can be only one, got {listed}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results = {}
        self._start("train", pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        place = (trainer.fit_loop.total_batch_idx + 1) % self.every_n_steps
        if place == 0 or place > self.every_n_steps - self.window:
            _update(self._meters["train"], outputs)
        if place == 0:
            self._report("train", trainer)
            self._start("train", pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "train" in self.results and "val" not in self.results:
            self._draw("train", trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("val", pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        _update(self._meters["val"], outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report("val", trainer)
            self._draw("val", trainer)

    def _start(self, stage: str, pl_module: LightningModule) -> None:
        decoder = routed_model(self, pl_module, "decoder").decoder
        self._meters[stage] = {
            kind: [
                None
                if n_experts is None
                else ExpertUtilization(n_experts, dead_share=self.dead_share).to(pl_module.device)
                for n_experts in layers
            ]
            for kind, layers in zip(("experts", "attention"), decoder.plan_sizes, strict=True)
        }

    def _report(self, stage: str, trainer: Trainer) -> None:
        self.results[stage] = {
            kind: [
                None if meter is None else Utilization(*(v.cpu() for v in meter.compute()))
                for meter in meters
            ]
            for kind, meters in self._meters[stage].items()
        }
        log_scalars(trainer, _scalars(stage, self.results[stage]))

    def _draw(self, stage: str, trainer: Trainer) -> None:
        utilizations = self.results[stage]
        if not any(any(layers) for layers in utilizations.values()):
            return
        run = run_folder(trainer)  # on all ranks
        if run is None or not trainer.is_global_zero:
            return
        step = trainer.global_step
        path = run / "utilization" / f"{stage}_step_{step:08d}.png"
        figure = utilization_figure(utilizations, title=f"gate shares, {stage}, step {step}")
        log_figure(trainer, f"utilization/{stage}", figure, path)
        with atomic_path(path.with_name("last.png")) as copy:
            shutil.copyfile(path, copy)


def _update(meters: Meters, outputs: Any) -> None:
    for kind, layers in outputs["routings"]._asdict().items():
        for meter, routing in zip(meters[kind], layers, strict=True):
            if meter is not None and routing is not None:
                meter.update(routing.probs, outputs["mask"])


def _scalars(stage: str, utilizations: Utilizations) -> dict[str, float]:
    scalars = {}
    for kind, layers in utilizations.items():
        for layer, used in enumerate(layers):
            if used is None:
                continue
            name = f"{stage}/{kind}/layer_{layer:02d}"
            scalars[f"{name}/effective"] = used.effective.item()
            scalars[f"{name}/entropy"] = used.entropy.item()
            scalars[f"{name}/conditional_entropy"] = used.conditional_entropy.item()
            scalars[f"{name}/max_share"] = used.share.max().item()
            scalars[f"{name}/dead"] = float(len(used.dead_experts))
    return scalars

"""How routers use their experts."""

import shutil
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_dsmoe.callbacks.needs import layers_for
from lightning_dsmoe.callbacks.open_record import OpenRecord
from lightning_dsmoe.callbacks.reporting import log_figure, log_scalars
from lightning_dsmoe.files import atomic_path
from lightning_dsmoe.metrics import DEAD_SHARE, ExpertUtilization, Utilization, utilization_figure
from lightning_dsmoe.routing.layer_names import short_names
from lightning_dsmoe.training.rank_zero import on_rank_zero
from lightning_dsmoe.training.run_folder import run_folder

Meters = dict[str, dict[str, ExpertUtilization]]
Utilizations = dict[str, dict[str, Utilization]]


class ExpertUtilizationMonitor(Callback):
    """Logs and plots how every router uses its experts, in training and in validation.

    For each router it logs the number of effective experts, both entropies in nats, the largest
    gate share and the number of dead experts, under names such as
    `train/experts/layer_03/effective` and `val/attention/layer_00/entropy`. The number is that in
    the name of the layer; where the names of a kind differ in more than one number, they stand in
    its place, as in `val/experts/encoder.blocks.3.mlp/entropy`. Each validation plots the gate
    shares of all layers, to `utilization/` in the log directory of the run and to loggers that take
    images; without validation, training plots its last report at its end.

    The model is any LightningModule with routed layers. A step that returns a dict with "mask" says
    which tokens count; otherwise all do.

    `results` holds the last report of "train" and of "val": for "experts" and for "attention" a
    `Utilization` of each layer, by name.

    Args:
        every_n_steps: training batches between reports.
        window: training batches that a report covers, the last ones before it.
        dead_share: an expert is dead if its gate share is at most this fraction of an even share.

    Raises:
        ValueError: if not 1 <= window <= every_n_steps or `dead_share` not in [0, 1), and before
            the first batch if the model has no routed layers or there is another
            ExpertUtilizationMonitor with other settings.

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
        self._record = OpenRecord()

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

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        place = self._place(trainer)
        if place == 0 or place > self.every_n_steps - self.window:
            self._record.open(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._update("train", outputs)
        if self._place(trainer) == 0:
            self._report("train", trainer)
            self._start("train", pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._record.close()

    on_train_epoch_end = on_exception

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "train" in self.results and "val" not in self.results:
            self._draw("train", trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("val", pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        self._record.open(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._update("val", outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report("val", trainer)
            self._draw("val", trainer)

    def _place(self, trainer: Trainer) -> int:
        """Batches since the last report; 0 at the last batch before a report."""
        return (trainer.fit_loop.total_batch_idx + 1) % self.every_n_steps

    def _start(self, stage: str, pl_module: LightningModule) -> None:
        meters: Meters = {"experts": {}, "attention": {}}
        for name, layer in layers_for(self, pl_module).items():
            meter = ExpertUtilization(layer.n_experts, dead_share=self.dead_share)
            meters[layer.kind][name] = meter.to(pl_module.device)
            # No token yet, and perhaps none later, in a layer that is not called.
            meter.update(torch.zeros(0, layer.n_experts, device=pl_module.device))
        self._meters[stage] = meters

    def _update(self, stage: str, outputs: Any) -> None:
        for name, (kind, probs, mask) in self._record.close(outputs).items():
            self._meters[stage][kind][name].update(probs, mask)

    def _report(self, stage: str, trainer: Trainer) -> None:
        self.results[stage] = {
            kind: {
                name: Utilization(*(value.cpu() for value in meter.compute()))
                for name, meter in meters.items()
            }
            for kind, meters in self._meters[stage].items()
        }
        log_scalars(trainer, _scalars(stage, self.results[stage]))

    def _draw(self, stage: str, trainer: Trainer) -> None:
        utilizations = self.results[stage]
        run = run_folder(trainer)  # on all ranks
        if run is None:
            return
        step = trainer.global_step
        path = run / "utilization" / f"{stage}_step_{step:08d}.png"

        def draw() -> None:
            figure = utilization_figure(utilizations, title=f"gate shares, {stage}, step {step}")
            log_figure(trainer, f"utilization/{stage}", figure, path)
            with atomic_path(path.with_name("last.png")) as copy:
                shutil.copyfile(path, copy)

        on_rank_zero(trainer, draw)  # a logger may send the figure far away


def _scalars(stage: str, utilizations: Utilizations) -> dict[str, float]:
    scalars = {}
    for kind, layers in utilizations.items():
        for short, used in zip(short_names(layers), layers.values(), strict=True):
            name = f"{stage}/{kind}/{short}"
            scalars[f"{name}/effective"] = used.effective.item()
            scalars[f"{name}/entropy"] = used.entropy.item()
            scalars[f"{name}/conditional_entropy"] = used.conditional_entropy.item()
            scalars[f"{name}/max_share"] = used.share.max().item()
            scalars[f"{name}/dead"] = float(len(used.dead_experts))
    return scalars

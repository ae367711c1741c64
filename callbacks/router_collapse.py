"""Routers that have come to use few of their experts.

Shapes: R routers, E experts; leading dimensions (tokens) are free.
"""

from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dsmoe.callbacks.needs import layers_for
from lightning_dsmoe.callbacks.open_record import OpenRecord
from lightning_dsmoe.callbacks.reporting import log_scalars
from lightning_dsmoe.losses.mutual_information import entropies_of
from lightning_dsmoe.losses.router_sums import over_ranks, router_sums
from lightning_dsmoe.routing.layer_names import short_names


class RouterCollapseAlarm(Callback):
    """Warns of a layer whose router has come to use few of its experts.

    effective experts = exp H(mean_x S(x)), from 1 to E

    It is measured for each layer by itself, on one training batch, that of all ranks, in
    `every_n_steps`; a mean over layers would hide two that collapsed on different experts. If it is
    below `share` of E in `patience` measurements in a row, a warning names the layer, the value and
    the limit, once for each layer in a run. `train/collapsed_routers` is the number of layers that
    are below the limit for that long, and `train/experts/layer_03/collapsed` is 1 from then on and
    0 once the layer has recovered.

    The model is any LightningModule with routed layers. A step that returns a dict with "mask" says
    which tokens count; otherwise all do. What `results` holds are the last effective experts by the
    name of a layer.

    Args:
        share: limit of the effective experts, as a share of a layer's E experts.
        patience: measurements in a row below the limit that raise the alarm.
        every_n_steps: training batches from one measurement to the next.
        stop: end training at the first alarm, as `EarlyStopping` does.

    Raises:
        ValueError: if `share` is not in (0, 1], `patience` or `every_n_steps` is below 1, and
            before training if the model has no routed layers.

    Examples:
        >>> from lightning import Trainer
        >>> from lightning_dsmoe.callbacks import RouterCollapseAlarm
        >>> alarm = RouterCollapseAlarm(share=0.25, patience=3)
        >>> trainer = Trainer(callbacks=[alarm], logger=False, accelerator="cpu")
        >>> alarm.results  # until the first measurement
        {}
    """

    def __init__(
        self,
        *,
        share: float = 0.5,
        patience: int = 5,
        every_n_steps: int = 50,
        stop: bool = False,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        for name, value in {"patience": patience, "every_n_steps": every_n_steps}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.share = share
        self.patience = patience
        self.every_n_steps = every_n_steps
        self.stop = stop
        self.results: dict[str, float] = {}
        self._below: dict[str, int] = {}
        self._warned: set[str] = set()
        self._record = OpenRecord()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers_for(self, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if (trainer.fit_loop.total_batch_idx + 1) % self.every_n_steps == 0:
            self._record.open(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        if self._record.is_open:
            self.results = self._measure(pl_module, outputs)
            self._judge(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._record.close()

    on_train_epoch_end = on_exception

    def _measure(self, pl_module: LightningModule, outputs: Any) -> dict[str, float]:
        """The effective experts of the layers that were called, over the tokens of all ranks."""
        said, sums, layers = self._record.close(outputs), [], layers_for(self, pl_module)
        for name, layer in layers.items():
            # Also of a layer that was called on other ranks only, which wait for this one's sums.
            nothing = torch.zeros(0, layer.n_experts, device=pl_module.device)
            _, probs, mask = said.get(name, (layer.kind, nothing, None))
            sums.append(router_sums(probs[None], mask))
        grouped = dist.is_available() and dist.is_initialized()
        summed = over_ranks(sums, dist.group.WORLD if grouped else None)
        effective = torch.cat([entropies_of(each).marginal.exp() for each in summed]).tolist()
        counts = torch.cat([each.tokens[:, 0] for each in summed]).tolist()
        return {
            name: value
            for name, value, count in zip(layers, effective, counts, strict=True)
            if count
        }

    def _judge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = layers_for(self, pl_module)
        for name, effective in self.results.items():
            n_experts = layers[name].n_experts
            limit = self.share * n_experts
            below = self._below.get(name, 0) + 1 if effective < limit else 0
            self._below[name] = below
            if below >= self.patience and name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(
                    f"RouterCollapseAlarm: {name} uses {effective:.2f} effective experts of "
                    f"{n_experts}, below {limit:.4g} in {below} measurements in a row, at step "
                    f"{trainer.global_step}; a larger weight of the mutual-information loss keeps "
                    "experts in use"
                )
                trainer.should_stop = trainer.should_stop or self.stop
        log_scalars(trainer, self._scalars(pl_module))

    def _scalars(self, pl_module: LightningModule) -> dict[str, float]:
        layers = layers_for(self, pl_module)
        scalars = {
            "train/collapsed_routers": float(
                sum(below >= self.patience for below in self._below.values())
            )
        }
        for kind in ("experts", "attention"):
            names = [name for name, layer in layers.items() if layer.kind == kind]
            for short, name in zip(short_names(names), names, strict=True):
                if name in self._warned:
                    collapsed = self._below[name] >= self.patience
                    scalars[f"train/{kind}/{short}/collapsed"] = float(collapsed)
        return scalars

    def state_dict(self) -> dict[str, Any]:
        return {"below": dict(self._below), "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._below = {str(name): int(count) for name, count in state_dict["below"].items()}
        self._warned = set(state_dict["warned"])

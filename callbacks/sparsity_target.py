"""A controller of the weights of the mutual-information loss."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_dsmoe.callbacks.gate_mass_controller import GateMassController, gate_mass_totals
from lightning_dsmoe.callbacks.mi_weight_setter import MI_WEIGHTS, MIWeightSetter
from lightning_dsmoe.callbacks.needs import check_automatic, layers_for
from lightning_dsmoe.callbacks.open_record import OpenRecord


class SparsityTarget(MIWeightSetter):
    """Adapts the weights of the mutual-information loss until the top K experts have a gate mass.

    The gate mass m is the mean over routers and tokens of the sum of the K largest probabilities,
    measured on every `every`-th optimizer step for feed-forward and for attention experts by
    themselves, and smoothed: m <- smoothing m + (1 - smoothing) measured. Then the weight is
    multiplied by

        rate^clip(e, -1, 1),  e = d + ahead (d - d'),  d = ln((1 - m) / (1 - mass)),

    with d' from the measurement before. So with too little mass in the top K the weight grows and
    the entropy of routing falls, with too much it is the reverse, and earlier than that if the
    trend leads there. (arXiv 2412.14711 changes its penalty's weight in steps of 1.2 or 1/1.2.)

    Routing of low entropy keeps it for long under a smaller weight: begin with weights that are
    rather too small. They are where the control starts and what its bounds refer to: those of the
    model's `RoutingLoss`. The state is saved in checkpoints, so a resumed run continues exactly.
    Once training ends, for whatever reason, the model has its own weights again.

    A training step that returns a dict with "mask" says which tokens count; otherwise all do.

    Args:
        expert_top_k: K of the feed-forward experts; None leaves their weight alone.
        attention_top_k: K of the attention experts; None leaves their weight alone.
        mass: target gate mass of the top K experts, above K/E of E experts and at most 0.9999.
        rate: the largest factor of a change, above 1.
        every: optimizer steps between two changes.
        smoothing: what earlier measurements count for, from 0 to below 1.
        ahead: measurements by which the trend is continued; 0 for none.
        least: the smallest factor to the model's own weight, above 0 and at most 1.
        most: the largest factor to the model's own weight, 1 or more.
        delay: optimizer steps before the first change.

    Raises:
        ValueError: if a number is out of range, if there is another callback that sets these
            weights, and before training if a K does not fit the model, its weight is 0, or the
            model has not one `RoutingLoss`.

    Examples:
        >>> from lightning_dsmoe.callbacks import SparsityTarget
        >>> target = SparsityTarget(expert_top_k=2, attention_top_k=1, mass=0.99)
        >>> target.top_k
        {'experts': 2, 'attention': 1}
    """

    def __init__(
        self,
        *,
        expert_top_k: int | None = None,
        attention_top_k: int | None = None,
        mass: float = 0.99,
        rate: float = 1.1,
        every: int = 10,
        smoothing: float = 0.5,
        ahead: float = 5.0,
        least: float = 0.01,
        most: float = 100.0,
        delay: int = 100,
    ) -> None:
        super().__init__()
        top_k = {"experts": expert_top_k, "attention": attention_top_k}
        self.top_k = {kind: k for kind, k in top_k.items() if k is not None}
        if not self.top_k or min(self.top_k.values()) < 1:
            raise ValueError(
                "SparsityTarget needs expert_top_k, attention_top_k or both, 1 or more, "
                f"got {expert_top_k} and {attention_top_k}"
            )
        if every < 1 or delay < 0:
            raise ValueError(
                f"every must be 1 or more and delay 0 or more, got {every} and {delay}"
            )
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.mass, self.rate, self.ahead = mass, rate, ahead
        self.least, self.most = least, most
        self.every, self.smoothing, self.delay = every, smoothing, delay
        _ = self.controller  # checks its numbers
        self._record = OpenRecord()
        self._start_afresh()

    @property
    def controller(self) -> GateMassController:
        """What changes the factors, with the options as they are now."""
        return GateMassController(self.mass, self.rate, self.ahead, self.least, self.most)

    def _start_afresh(self) -> None:
        self._factors = dict.fromkeys(self.top_k, 1.0)
        self._masses: dict[str, float] = {}
        self._totals: dict[str, Tensor] = {}
        self._steps_before_batch = 0

    def state_dict(self) -> dict[str, Any]:
        """Factors and smoothed masses by kind."""
        return {"factors": dict(self._factors), "masses": dict(self._masses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, with those kinds that are controlled now."""
        for name, values in (("factors", self._factors), ("masses", self._masses)):
            values.update({k: float(v) for k, v in state_dict[name].items() if k in self.top_k})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._start_afresh()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_automatic(self, pl_module)
        layers = layers_for(self, pl_module).values()
        self._remember(pl_module, self.top_k)
        for kind, k in self.top_k.items():
            n_experts = min((each.n_experts for each in layers if each.kind == kind), default=0)
            self._check(kind, k, n_experts)

    def _check(self, kind: str, k: int, n_experts: int) -> None:
        weight = MI_WEIGHTS[kind]
        name = f"SparsityTarget, {weight.removesuffix('_mi')}_top_k={k}"
        if not n_experts:
            raise ValueError(f"{name}: the model has no router of this kind")
        if k >= n_experts:
            raise ValueError(f"{name}: must be below the number of experts, {n_experts}")
        if self.mass <= k / n_experts:
            raise ValueError(
                f"{name}: equal gates of {n_experts} experts give the top {k} a mass of "
                f"{k / n_experts:.4g} already, and mass must be above it, got {self.mass}"
            )
        if not self._configured[kind] > 0:
            raise ValueError(
                f"{name}: the weight {weight} of the RoutingLoss must be above 0, "
                f"got {self._configured[kind]}"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._steps_before_batch = trainer.global_step
        self._scale(self._factors)
        if (trainer.global_step + 1) % self.every == 0:
            self._record.open(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        step = self._steps_before_batch + 1
        tokens = self._record.close(outputs).values()
        if step % self.every == 0:
            for kind, k in self.top_k.items():
                none = torch.zeros(2, device=pl_module.device)
                totals = [gate_mass_totals(p, k, mask) for of, p, mask in tokens if of == kind]
                self._totals[kind] = sum(totals, self._totals.get(kind, none))
        if trainer.global_step < step:
            return  # gradients are being accumulated
        for kind, total in self._totals.items():
            self._control(kind, trainer.strategy.reduce(total, reduce_op="sum"), step)
        self._totals = {}
        masses = {f"{kind}/top_mass": mass for kind, mass in self._masses.items()}
        self._log(trainer, step, self._factors, **masses)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._record.close()
        super().on_exception(trainer, pl_module)

    def _control(self, kind: str, totals: Tensor, step: int) -> None:
        mass, tokens = totals.tolist()
        if not tokens:
            return
        before = self._masses.get(kind, mass / tokens)
        mass = self.smoothing * before + (1 - self.smoothing) * mass / tokens
        self._masses[kind] = mass
        if step >= self.delay:
            factor = self._factors[kind]
            self._factors[kind] = self.controller.next_factor(factor, mass, before)

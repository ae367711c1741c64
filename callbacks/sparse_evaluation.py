"""What a model reaches under sparse plans, beside what it reaches without them."""

import math
import re
from collections.abc import Mapping, MutableMapping, MutableSequence
from copy import copy
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_dsmoe.callbacks.naming import check_name
from lightning_dsmoe.callbacks.needs import PlanSpec, check_runs, load_plan
from lightning_dsmoe.callbacks.open_record import token_mask
from lightning_dsmoe.metrics import ActiveParameters, count_parameters
from lightning_dsmoe.moved import renamed_attributes
from lightning_dsmoe.routing import RoutingRecord, record_routings, run_plan
from lightning_dsmoe.training.evaluation_loss import EvaluationLoss
from lightning_dsmoe.training.undisturbed import fresh_copies, metrics_of, undisturbed


@renamed_attributes(loss="sparse_loss", gap="relative_gap", active_share="active_share_mean")
class SparseResult(NamedTuple):
    """A model under one plan, over a whole split.

    Args:
        sparse_loss: loss under the plan; NaN for a step that neither returns nor logs a loss.
        dense_loss: loss of the same batches as the model runs without the plan, likewise.
        relative_gap: sparse_loss / dense_loss - 1.
        active_share_mean: mean share of the hidden parameters that run for a token.
        active_share_p50: its median over tokens.
        active_share_p95: its 95th percentile.
    """

    sparse_loss: float
    dense_loss: float
    relative_gap: float
    active_share_mean: float
    active_share_p50: float
    active_share_p95: float


class _Run:
    """The steps of a split on one data loader, under one plan.

    Args:
        pl_module: the module.
        prefix: what names of logged values begin with, in place of "val/" or "test/".
    """

    def __init__(self, pl_module: LightningModule, prefix: str) -> None:
        self.prefix, self._log = prefix, pl_module.log
        self._losses = f"{prefix}loss", ""
        self._batch_size: int | None = None
        self.known: set[str] = set()
        self._dense_loss = EvaluationLoss().to(pl_module.device)
        self._active = ActiveParameters(count_parameters(pl_module)).to(pl_module.device)

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        **options: Any,
    ) -> None:
        """Take the place of the module's `log`."""
        renamed = self.prefix + re.sub("^(val|test)/", "", name)
        if name in ("loss", "val/loss", "test/loss", "val_loss", "test_loss"):
            self._losses = renamed, name
            self.known.add("gap")
        self._batch_size = options.get("batch_size", self._batch_size)
        if isinstance(value, Metric):  # Lightning would look for the one that it stands in for
            options["metric_attribute"] = name
        self._log(renamed, value, logger=logger, on_step=False, on_epoch=True, **options)

    def add(self, outputs: Any, sparse: Any, batch: Any, record: RoutingRecord) -> None:
        """Take what a step returned without and with the plan, and what ran."""
        mask = token_mask(sparse)
        dense_loss, sparse_loss = _loss(outputs), _loss(sparse)
        if dense_loss is not None and sparse_loss is not None and not self._losses[1]:
            size = extract_batch_size(batch) if self._batch_size is None else self._batch_size
            weight: Any = size if mask is None else mask.sum()
            self._log(self._losses[0], sparse_loss, batch_size=weight, sync_dist=True)
            self._dense_loss.update(dense_loss, weight)
            self.known.add("gap")
        ran = record.active_masks()
        try:
            self._active.update(ran, mask)
        except ValueError as error:
            rank_zero_warn(f"SparseEvaluation finds no active share of a token: {error}")
            return
        self.known.add("active_share")

    def result(self, logged: Mapping[str, Tensor], loader: str) -> SparseResult:
        """What the plan reaches, beside what was logged."""
        none = torch.tensor(math.nan)
        sparse, dense = (logged.get(name + loader, none).item() for name in self._losses)
        if not self._losses[1] and "gap" in self.known:
            dense = self._dense_loss.compute().item()
        share = self._active.compute() if "active_share" in self.known else (none,) * 3
        gap = sparse / dense - 1 if dense else 0.0
        return SparseResult(sparse, dense, gap, *(value.item() for value in share))


class SparseEvaluation(Callback):
    """Runs every validation and test step under sparse plans too, and logs what it reaches there.

    The model is any LightningModule with routed layers. What its step logs as `val/<name>` or
    `<name>` is logged as `val/sparse/<plan>/<name>` too, and what it returns as its loss, if it
    logs none, as `val/sparse/<plan>/loss`. Beside them are `.../active_share` (share of the hidden
    parameters that run, mean over tokens) and `.../gap` (loss relative to that without the plan,
    minus 1). The run without a plan is not disturbed: metrics, loggers, attributes of the model and
    random numbers are as if it was the only one.

    The mean of a returned loss weights a step by the tokens in the "mask" of the dict that it
    returns, otherwise by the `batch_size` that it logs with or that Lightning finds in the batch.

    `results` holds the last evaluation: a `SparseResult` for each plan; of several data loaders for
    each, by names that end in `/dataloader_idx_0` and so on, as those of Lightning.

    Args:
        plans: by name, a plan or the path of a saved one. Names consist of letters, digits, `_`,
            `.`, `+` and `-`.

    Raises:
        ValueError: if there is no plan, a name is invalid or a file is not a plan, and before the
            first batch if another SparseEvaluation has a plan of the same name, the model has no
            routed layers, a plan does not fit it or the strategy is FSDP.

    Examples:
        >>> from lightning_dsmoe import SelectionPlan, Threshold, TopK
        >>> from lightning_dsmoe.callbacks import SparseEvaluation
        >>> evaluation = SparseEvaluation(
        ...     {
        ...         "top_1": SelectionPlan(experts=TopK(1)),
        ...         "threshold_0.1": SelectionPlan(Threshold(0.1), Threshold(0.1)),
        ...     }
        ... )
        >>> sorted(evaluation.plans)
        ['threshold_0.1', 'top_1']
    """

    def __init__(self, plans: Mapping[str, PlanSpec]) -> None:
        if not plans:
            raise ValueError("SparseEvaluation needs at least one plan")
        for name in plans:
            check_name("the name of a plan", name)
        self.plans = {n: load_plan(f"SparseEvaluation, {n!r}", p) for n, p in plans.items()}
        self.results: dict[str, SparseResult] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        names = [n for each in callbacks if isinstance(each, SparseEvaluation) for n in each.plans]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"more than one SparseEvaluation has a plan named {', '.join(twice)}, and their "
                "results would be logged under the same names: rename one"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "SparseEvaluation counts the parameters of experts, which FSDPStrategy flattens; "
                "use ModelParallelStrategy, or leave it out"
            )
        for name, plan in self.plans.items():
            check_runs(f"SparseEvaluation, {name!r}", plan, pl_module)
        self._metrics = {name: fresh_copies(metrics_of(pl_module)) for name in self.plans}
        self._runs: dict[tuple[str, str], _Run] = {}

    # In `fit` too, so that what does not fit the model fails before the first step.
    on_fit_start = on_test_start = on_validation_start

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int
    ) -> None:
        self._batch = _kept(batch)  # before a step takes something out of it

    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *place: int
    ) -> None:
        step = f"{'test' if trainer.testing else 'validation'}_step"
        loader = f"/dataloader_idx_{place[1]}" if len(place) > 1 else ""
        if not is_param_in_hook_signature(getattr(pl_module, step), "batch_idx", min_args=2):
            place = place[1:]  # as Lightning calls it
        for name, plan in self.plans.items():
            if (name, loader) not in self._runs:
                prefix = f"{'test' if trainer.testing else 'val'}/sparse/{name}/"
                self._runs[name, loader] = _Run(pl_module, prefix)
            run = self._runs[name, loader]
            with (
                undisturbed(trainer, pl_module, self._metrics[name], run.log),
                run_plan(pl_module, plan),
                record_routings(pl_module) as record,
            ):
                sparse = getattr(trainer.strategy, step)(_kept(self._batch), *place)
            run.add(outputs, sparse, self._batch, record)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.results = {}
        for (name, loader), run in self._runs.items():
            self.results[name + loader] = result = run.result(trainer.callback_metrics, loader)
            scalars = {"gap": result.relative_gap, "active_share": result.active_share_mean}
            for key, value in scalars.items():
                if key in run.known:
                    named = f"{run.prefix}{key}{loader}"
                    pl_module.log(named, value, sync_dist=True, add_dataloader_idx=False)

    on_test_epoch_end = on_validation_epoch_end


def _kept(batch: Any) -> Any:
    return copy(batch) if isinstance(batch, MutableMapping | MutableSequence) else batch


def _loss(outputs: Any) -> Tensor | None:
    """The loss among what a step returned, if there is one."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None

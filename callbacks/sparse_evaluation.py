"""Loss and active share of a model under sparse plans, beside the dense one.

Shapes: B sequences, T positions, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from lightning_dsmoe.callbacks.layer_selections import PlanSpec, load_plan, plan_for
from lightning_dsmoe.callbacks.naming import check_name
from lightning_dsmoe.callbacks.routed_model import routed_model
from lightning_dsmoe.losses.cross_entropy import summed_cross_entropy
from lightning_dsmoe.metrics import ActiveParameters, active_masks, count_parameters
from lightning_dsmoe.moved import renamed_attributes
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.training.evaluation_loss import EvaluationLoss


@renamed_attributes(loss="sparse_loss", gap="relative_gap", active_share="active_share_mean")
class SparseResult(NamedTuple):
    """A model under one plan, over a whole split.

    Args:
        sparse_loss: cross entropy under the plan, in nats per token.
        dense_loss: cross entropy of the same tokens as the model runs without the plan.
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


class SparseEvaluation(Callback):
    """Runs validation and test under sparse plans too, and logs their loss, active share and gap.

    The names are `val/sparse/<plan>/loss`, `.../active_share` (share of the hidden parameters that
    run, mean over tokens) and `.../gap` (loss relative to that without the plan, minus 1).
    `results` holds the last evaluation: a `SparseResult` for each plan.

    Args:
        plans: by name, selections for all layers, a plan, or the path of a saved plan. Names
            consist of letters, digits, `_`, `.`, `+` and `-`.

    Raises:
        ValueError: if there is no plan, a name is invalid or a file is not a plan, and before the
            first batch if another SparseEvaluation has a plan of the same name, a plan does not fit
            the model or the strategy is FSDP.

    Examples:
        >>> from lightning_dsmoe import Threshold, TopK
        >>> from lightning_dsmoe.callbacks import LayerSelections, SparseEvaluation
        >>> evaluation = SparseEvaluation(
        ...     {
        ...         "top_1": LayerSelections(experts=TopK(1)),
        ...         "threshold_0.1": LayerSelections(Threshold(0.1), Threshold(0.1)),
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
        self._dense_loss = EvaluationLoss()
        self._meters: dict[str, tuple[SelectionPlan, EvaluationLoss, ActiveParameters]] = {}

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
                "SparseEvaluation runs the model outside of Lightning's own steps, which FSDP does "
                "not let it; use another strategy or leave it out"
            )
        decoder = routed_model(self, pl_module, "decoder").decoder
        counts = count_parameters(decoder)
        self._dense_loss = EvaluationLoss().to(pl_module.device)
        self._meters = {}
        for name, spec in self.plans.items():
            plan = plan_for(f"SparseEvaluation, {name!r}", spec, decoder)
            active = ActiveParameters(counts).to(pl_module.device)
            self._meters[name] = plan, EvaluationLoss().to(pl_module.device), active

    # In `fit` too, so that what does not fit the model fails before the first step.
    on_fit_start = on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        mask_BT = outputs["mask"]
        count = mask_BT.sum()
        self._dense_loss.update(outputs["loss"], count)
        for plan, loss, active in self._meters.values():
            with trainer.precision_plugin.forward_context():
                logits_BTV, routings = pl_module(batch["input_ids"], plan)
            nll = summed_cross_entropy(logits_BTV, batch["labels"])
            loss.update(nll / count.clamp_min(1), count)
            active.update(*active_masks(routings, plan), mask_BT)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(pl_module, "test")

    def _report(self, pl_module: LightningModule, stage: str) -> None:
        dense_loss = self._dense_loss.compute().item()
        self.results = {}
        for name, (_, loss, active) in self._meters.items():
            sparse_loss = loss.compute().item()
            gap = sparse_loss / dense_loss - 1 if dense_loss else 0.0
            share = (value.item() for value in active.compute())
            self.results[name] = SparseResult(sparse_loss, dense_loss, gap, *share)
            active_share = self.results[name].active_share_mean
            scalars = {"loss": sparse_loss, "active_share": active_share, "gap": gap}
            names = {f"{stage}/sparse/{name}/{key}": value for key, value in scalars.items()}
            pl_module.log_dict(names, sync_dist=True)

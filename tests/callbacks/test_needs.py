"""What callbacks say of a model that has nothing of what they need."""

from collections.abc import Callable

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_dsmoe.callbacks import (
    ExpertUtilizationMonitor,
    MIWeightAnnealing,
    SparseCompile,
    SparseEvaluation,
    SparseFinishing,
    SparsityTarget,
)
from lightning_dsmoe.routing import SelectionPlan

ROUTED = "needs a model with routed layers, such as MixtureOfExperts"
NEEDS: dict[Callback, str] = {
    ExpertUtilizationMonitor(): f"ExpertUtilizationMonitor {ROUTED}",
    MIWeightAnnealing(steps=1): "MIWeightAnnealing: BoringModel has no RoutingLoss: add",
    SparseCompile(SelectionPlan(), max_batches=0): f"SparseCompile {ROUTED}",
    SparseEvaluation({"all": SelectionPlan()}): f"SparseEvaluation, 'all' {ROUTED}",
    SparseFinishing(SelectionPlan(), steps=1): f"SparseFinishing {ROUTED}",
    SparsityTarget(attention_top_k=1): f"SparsityTarget {ROUTED}",
}


@pytest.mark.parametrize("callback", NEEDS, ids=lambda callback: type(callback).__name__)
def test_other_models_are_refused_with_what_they_lack(
    callback: Callback, make_trainer: Callable[..., Trainer]
) -> None:
    with pytest.raises(ValueError, match=f"^{NEEDS[callback]}.*$"):
        make_trainer(callbacks=[callback], max_steps=1).fit(BoringModel())

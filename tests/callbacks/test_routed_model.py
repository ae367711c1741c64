"""What callbacks need from a model, and what they say of one that has it not."""

from collections.abc import Callable
from typing import Any

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_dsmoe.callbacks import (
    ExpertUtilizationMonitor,
    LayerSelections,
    MIWeightAnnealing,
    SparseCompile,
    SparseEvaluation,
    SparseFinishing,
    SparsityTarget,
)
from lightning_dsmoe.callbacks.routed_model import routed_model

NEEDS: dict[Callback, str] = {
    ExpertUtilizationMonitor(): "decoder",
    MIWeightAnnealing(steps=1): "expert_mi_weight, attention_mi_weight",
    SparseCompile(LayerSelections()): "decoder",
    SparseEvaluation({"all": LayerSelections()}): "decoder",
    SparseFinishing(LayerSelections(), steps=1): "decoder, plan",
    SparsityTarget(attention_top_k=1): "decoder",
}


@pytest.mark.parametrize("callback", NEEDS, ids=lambda callback: type(callback).__name__)
def test_other_models_are_refused_with_what_they_lack(
    callback: Callback, make_trainer: Callable[..., Trainer]
) -> None:
    expected = (
        f"^{type(callback).__name__} needs a model with routed layers, .*; "
        f"BoringModel has no {NEEDS[callback]}$"
    )
    with pytest.raises(TypeError, match=expected):
        make_trainer(callbacks=[callback], max_steps=1).fit(BoringModel())


def test_a_decoder_of_another_kind_is_none(model: Any) -> None:
    callback = ExpertUtilizationMonitor()
    assert routed_model(callback, model, "decoder", "plan", "expert_mi_weight") is model
    other: Any = BoringModel()
    other.decoder = other.layer
    with pytest.raises(TypeError, match=r"no decoder$"):
        routed_model(callback, other, "decoder")

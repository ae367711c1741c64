"""Lightning's callbacks that average weights, which copy the model before it is set up."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.training.language_model import DSMoELanguageModel

pytestmark = pytest.mark.slow

EPOCHS = 4


def untouched_model() -> DSMoELanguageModel:
    torch.manual_seed(3)
    attention = partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4)
    feed_forward = partial(MixtureOfExperts, n_experts=4, d_expert=3)
    return DSMoELanguageModel(97, 8, 2, attention=attention, feed_forward=feed_forward)


class Weights(Callback):
    """Keeps the weights at the beginning of each epoch and after each step."""

    def __init__(self) -> None:
        self.epochs: list[Tensor] = []
        self.steps: list[Tensor] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.epochs.append(flat(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: object) -> None:
        self.steps.append(flat(pl_module))


def flat(model: DSMoELanguageModel) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def stochastic(weights: Weights) -> Tensor:
    return torch.stack(weights.epochs).mean(0)


def equal(weights: Weights) -> Tensor:
    return torch.stack(weights.steps).mean(0)


def exponential(weights: Weights) -> Tensor:
    average = weights.steps[0]
    for step in weights.steps[1:]:
        average = 0.75 * average + 0.25 * step
    return average


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback:UserWarning")
@pytest.mark.parametrize(
    ("callback", "average"),
    [
        (partial(StochasticWeightAveraging, 1e-2, swa_epoch_start=1), stochastic),
        (WeightAveraging, equal),
        (partial(EMAWeightAveraging, decay=0.75), exponential),
    ],
)
def test_what_is_left_is_the_average(
    callback: Callable[[], Callback],
    average: Callable[[Weights], Tensor],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    model, weights = untouched_model().double(), Weights()  # so are the copies
    trainer = make_trainer(
        max_epochs=EPOCHS, precision="64-true", logger=False, callbacks=[weights, callback()]
    )
    trainer.fit(model, make_loader(6))
    expected = average(weights)
    torch.testing.assert_close(flat(model), expected, rtol=0, atol=1e-7)
    assert (weights.steps[-1] - expected).abs().max() > 1e-4
    assert model.decoder.head.weight is model.decoder.embedding.weight


def test_an_optimizer_made_by_hand_has_all_parameters() -> None:
    model = untouched_model()
    groups = model.configure_optimizers().param_groups
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())
    assert found

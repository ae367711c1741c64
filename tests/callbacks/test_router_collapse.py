"""An alarm for each layer whose router uses few experts."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from lightning_dsmoe.callbacks import RouterCollapseAlarm
from lightning_dsmoe.losses import entropy
from lightning_dsmoe.training.language_model import DSMoELanguageModel

from .classifier import classifier, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    # From inside of Lightning; `pytest.warns` tells it once more, from elsewhere.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]
NAMES = [f"encoder.blocks.{block}.1.layer" for block in range(2)]


class Collapse(Callback):
    """Lets both routers send every token to one expert, each to another, in some steps."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for block, norm in enumerate(pl_module.encoder.blocks):
            with torch.no_grad():
                norm[0].bias.fill_(1.0)
                norm[0].weight.fill_(0.0)
                router = norm[1].layer.router.weight
                router.zero_()
                if trainer.global_step in self.steps:
                    router[block] = 50.0


def fit(make_trainer: Callable[..., Trainer], *callbacks: Callback, **options: Any) -> Trainer:
    trainer = make_trainer(**{"max_steps": 6, "callbacks": list(callbacks), **options})
    trainer.fit(classifier(), loader(24))
    return trainer


def test_every_collapsed_layer_is_named_once(make_trainer: Callable[..., Trainer]) -> None:
    alarm = RouterCollapseAlarm(patience=2, every_n_steps=1)
    with pytest.warns(UserWarning, match="RouterCollapseAlarm") as caught:
        trainer = fit(make_trainer, Collapse(range(1, 5)), alarm, max_steps=5)
    told = [str(each.message) for each in caught if "RouterCollapse" in str(each.message)]
    for name, text in zip(NAMES, told, strict=True):
        expected = f"{name} uses 1.00 effective experts of 4, below 2 in 2 measurements in a row"
        assert expected in text
        assert "at step 3" in text
    assert trainer.callback_metrics["train/collapsed_routers"] == 2
    assert trainer.callback_metrics["train/experts/encoder.blocks.0.1.layer/collapsed"] == 1


def test_a_layer_that_recovers_is_no_longer_counted(make_trainer: Callable[..., Trainer]) -> None:
    alarm = RouterCollapseAlarm(patience=2, every_n_steps=1)
    with pytest.warns(UserWarning, match="RouterCollapseAlarm"):
        trainer = fit(make_trainer, Collapse(range(1, 4)), alarm)
    assert trainer.callback_metrics["train/collapsed_routers"] == 0
    assert trainer.callback_metrics["train/experts/encoder.blocks.1.1.layer/collapsed"] == 0
    assert alarm.results == {name: pytest.approx(4.0) for name in NAMES}


def test_a_short_collapse_is_no_alarm(make_trainer: Callable[..., Trainer]) -> None:
    alarm = RouterCollapseAlarm(patience=3, every_n_steps=1)
    trainer = fit(make_trainer, Collapse(range(1, 3)), alarm)
    assert trainer.callback_metrics["train/collapsed_routers"] == 0


def test_it_can_end_training(make_trainer: Callable[..., Trainer]) -> None:
    alarm = RouterCollapseAlarm(patience=1, every_n_steps=2, stop=True)
    with pytest.warns(UserWarning, match="RouterCollapseAlarm"):
        trainer = fit(make_trainer, Collapse(range(3, 6)), alarm)
    assert trainer.global_step == 4


def test_counts_and_warnings_are_in_checkpoints() -> None:
    alarm, other = RouterCollapseAlarm(), RouterCollapseAlarm()
    alarm._below, alarm._warned = {"a": 7, "b": 0}, {"a"}
    other.load_state_dict(alarm.state_dict())
    assert (other._below, other._warned) == (alarm._below, alarm._warned)


def test_tokens_that_do_not_count_are_left_out(
    make_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    class Outputs(Callback):
        def on_train_batch_end(self, trainer: Trainer, model: Any, outputs: Any, *_: Any) -> None:
            self.last = outputs

    alarm, outputs = RouterCollapseAlarm(share=0.01, every_n_steps=4), Outputs()
    trainer = make_trainer(max_steps=4, callbacks=[alarm, outputs])
    trainer.fit(make_model(), make_loader(4))
    mask = outputs.last["mask"]
    assert not mask.all()
    for kind, name in (("experts", "feed_forward"), ("attention", "attention")):
        for block, routing in enumerate(getattr(outputs.last["routings"], kind)):
            expected = entropy(routing.probs[mask].mean(0)).exp().item()
            found = alarm.results[f"decoder.blocks.{block}.{name}"]
            assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share must be above 0 and at most 1, got 0.0"),
        ({"share": math.nan}, "share must be"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        RouterCollapseAlarm(**options)

"""Steps and checkpoints that would spread numbers that are not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dsmoe.inference import load_decoder
from lightning_dsmoe.training.language_model import DSMoELanguageModel

MakeModel = Callable[..., DSMoELanguageModel]
NAME = "decoder.blocks.0.feed_forward.router.weight"


class Spoil(Callback):
    """Puts an infinite number into one gradient, or into one weight, at a step."""

    def __init__(self, *, gradient: int | None = None, weight: int | None = None) -> None:
        self.gradient, self.weight = gradient, weight

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == self.gradient:
            pl_module.get_parameter(NAME).grad[0, 0] = float("inf")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.weight:
            pl_module.get_parameter(NAME).data[0, 0] = float("nan")


def keeper(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=1, save_on_exception=True, **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_infinite_gradient_ends_training_before_the_step(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    precision: str,
    clip: float | None,
) -> None:
    model = make_one_model()
    callbacks = [Spoil(gradient=2), keeper(tmp_path / "kept", save_top_k=-1)]
    trainer = make_trainer(
        max_steps=4,
        callbacks=callbacks,
        enable_checkpointing=True,
        precision=precision,
        gradient_clip_val=clip,
    )
    message = rf"gradient is not finite at step 2, batch 2 \({NAME}\); no step was taken"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(model, make_loader(15), make_loader(3))
    assert trainer.global_step == 2
    for path in tmp_path.glob("kept/*.ckpt"):  # one of them is written for the error
        load_decoder(path)
    before = load_decoder(tmp_path / "kept" / "epoch=0-step=2.ckpt").decoder.state_dict()
    for name, weight in model.decoder.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_precision_that_scales_gradients_leaves_out_the_step_itself(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer(max_steps=1, callbacks=[Spoil(gradient=0)])
    trainer.precision_plugin.scaler = object()  # as MixedPrecision has one for float16
    trainer.fit(make_one_model(), make_loader(), make_loader(3))
    assert trainer.global_step == 1


def test_weights_that_are_not_finite_replace_no_checkpoint(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    callbacks = [Spoil(weight=3), keeper(tmp_path / "kept", save_last=True)]
    trainer = make_trainer(max_steps=4, callbacks=callbacks, enable_checkpointing=True)
    message = rf"the weights are not finite \({NAME}\), so no checkpoint was written"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(make_one_model(), make_loader(15), make_loader(3))
    assert {path.name for path in tmp_path.glob("kept/*.ckpt")} == {
        "epoch=0-step=2.ckpt",
        "last.ckpt",
    }
    for path in tmp_path.glob("kept/*.ckpt"):
        load_decoder(path)


def test_the_first_error_is_told_where_weights_cannot_be_saved_after_it(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    callbacks = [Spoil(weight=1), ModelCheckpoint(tmp_path / "kept", save_on_exception=True)]
    trainer = make_trainer(max_steps=4, callbacks=callbacks, enable_checkpointing=True)
    message = r"(?s)the loss is nan at step 1, batch 1 .*; the weights are not finite \(.*\), so no"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(make_one_model(), make_loader(15), make_loader(3))
    assert not list(tmp_path.glob("kept/*.ckpt"))

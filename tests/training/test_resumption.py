"""Subclasses that override hooks, and lose nothing of what a run goes on with."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import ReduceLROnPlateau

from lightning_dsmoe.data import TextDataModule
from lightning_dsmoe.serialization.checkpoint import read_checkpoint
from lightning_dsmoe.training.language_model import DSMoELanguageModel
from lightning_dsmoe.training.resumption import Resumption

from .conftest import ATTENTION, FEED_FORWARD

STEPS = 5


class OwnHooks(DSMoELanguageModel):
    """Overrides every hook that its base might have used, as a LightningModule may."""

    def configure_callbacks(self) -> Callback:  # type: ignore[override]
        return EarlyStopping("val/loss", patience=9)

    def setup(self, stage: str) -> None:
        self.called = {"setup"}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.mine = checkpoint["mine"]

    def on_fit_start(self) -> None:
        self.called.add("on_fit_start")

    def on_train_start(self) -> None:
        self.called.add("on_train_start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.called.add("on_train_batch_start")

    def on_validation_epoch_start(self) -> None:
        self.called.add("on_validation_epoch_start")

    def on_validation_epoch_end(self) -> None:
        self.called.add("on_validation_epoch_end")


class Mixin:
    """Overrides from the side."""

    def configure_callbacks(self) -> list[Callback]:
        return [EarlyStopping("val/loss")]


class WithMixin(Mixin, DSMoELanguageModel):
    pass


class Below(OwnHooks):
    def configure_callbacks(self) -> list[Callback]:  # type: ignore[override]
        return [*super().configure_callbacks(), EarlyStopping("train/loss")]


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def make(cls: type[DSMoELanguageModel] = DSMoELanguageModel, **options: Any) -> DSMoELanguageModel:
    torch.manual_seed(3)
    parts = {"attention": ATTENTION, "feed_forward": FEED_FORWARD}
    return cls(256, 16, 1, **{**parts, "dropout": 0.2, **options})


@pytest.fixture
def fit(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Callable[..., Trainer]:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(32 + (7 * i * i + 3 * i) % 60) for i in range(400)))

    def run(
        model: LightningModule, seed: int, ckpt_path: Path | None = None, **options: Any
    ) -> Trainer:
        torch.manual_seed(seed)
        cache = str(tmp_path / "cache")
        data = TextDataModule(str(text), context=16, batch_size=4, cache_dir=cache)
        trainer = make_trainer(**{"max_steps": STEPS, "val_check_interval": 2, **options})
        trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run


def test_hooks_without_super_resume_bitwise(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    rate = partial(torch.optim.AdamW, lr=3e-3)
    straight = fit(make(optimizer=rate), 1).lightning_module
    saving = make(OwnHooks, optimizer=rate)
    fit(saving, 1, callbacks=[SaveAt(3, path)])
    resumed = make(OwnHooks, optimizer=rate)
    trainer = fit(resumed, 2, path)
    assert resumed.mine == 7
    assert len(resumed.called) == 6
    assert "val/loss" in trainer.callback_metrics
    for model in (saving, resumed):
        for name, value in straight.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
    saved = read_checkpoint(path)
    assert saved["architecture"] is not None
    assert len(saved["random_state"]) == 1
    with pytest.raises(ValueError, match=r"optimizer is .*AdamW, this run's is .*SGD"):
        fit(make(OwnHooks, optimizer=partial(torch.optim.SGD, lr=1.0)), 2, path)
    newer = tmp_path / "newer.ckpt"
    torch.save({**saved, "format_version": 99}, newer)
    with pytest.raises(ValueError, match="99"):
        fit(make(OwnHooks, optimizer=rate), 2, newer)


def test_a_plateau_is_reduced_without_the_hook(fit: Callable[..., Trainer]) -> None:
    plateau = partial(ReduceLROnPlateau, monitor="val/loss", threshold=9, patience=0)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    trainer = fit(make(OwnHooks, optimizer=optimizer, lr_scheduler=plateau), 1)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.05


@pytest.mark.parametrize(
    ("cls", "n_stops"), [(DSMoELanguageModel, 0), (OwnHooks, 1), (WithMixin, 1), (Below, 2)]
)
def test_callbacks_of_a_subclass_come_beside(
    cls: type[DSMoELanguageModel], n_stops: int, fit: Callable[..., Trainer]
) -> None:
    trainer = fit(make(cls), 1, max_steps=1)
    for _ in range(2):
        found = [type(each) for each in trainer.callbacks]  # type: ignore[attr-defined]
        assert found.count(Resumption) == 1
        assert found.count(EarlyStopping) == n_stops
        trainer.validate(trainer.lightning_module, trainer.val_dataloaders)


def test_another_module_in_the_same_trainer_is_left_alone(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    class Other(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("of_other", 1.0)

    trainer = fit(make(), 1, max_steps=1)
    [results] = trainer.test(Other(), trainer.val_dataloaders)
    assert results == {"of_other": 1.0}
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    assert "format_version" not in torch.load(tmp_path / "other.ckpt")


def test_weights_alone_are_described(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = fit(make(), 1, max_steps=1)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    saved = read_checkpoint(tmp_path / "weights.ckpt")
    assert saved["architecture"] is not None
    assert "optimizer_states" not in saved

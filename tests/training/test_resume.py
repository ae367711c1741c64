"""A run that was interrupted goes on as if it had not been."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, OneCycleLR

from lightning_dsmoe.data import TextDataModule
from lightning_dsmoe.schedules import LinearWarmupCosine
from lightning_dsmoe.training.language_model import DSMoELanguageModel

pytestmark = pytest.mark.slow

MakeModel = Callable[..., DSMoELanguageModel]
STEPS = 8


class SaveAt(Callback):
    """Saves when a hook runs after a number of steps."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.step = step
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def data(tmp_path: Path) -> TextDataModule:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(32 + (7 * i * i + 3 * i) % 60) for i in range(400)))
    return make_data(tmp_path)


class InterruptAt(Callback):
    """Interrupts in a hook, by default on the way back, and saves as `ModelCheckpoint` can."""

    def __init__(self, step: int, path: Path, hook: str = "on_after_backward") -> None:
        self.step = step
        self.path = path
        setattr(self, hook, self.interrupt)

    def interrupt(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("interrupted")

    def on_exception(self, trainer: Trainer, *args: object) -> None:
        trainer.save_checkpoint(self.path)


def make_data(folder: Path) -> TextDataModule:
    return TextDataModule(
        str(folder / "text.txt"), context=16, batch_size=4, cache_dir=str(folder / "cache")
    )


@pytest.mark.parametrize(
    ("make_model", "hook", "step", "validate_every"),
    [
        pytest.param("rotary", "on_train_batch_end", 1, 3, id="inside an epoch"),
        pytest.param("learned", "on_train_batch_end", 3, 3, id="before a validation"),
        pytest.param("rotary", "on_validation_end", 3, 3, id="after a validation"),
        pytest.param("learned", "on_train_batch_end", 5, 3, id="last batch of an epoch"),
        pytest.param("rotary", "on_train_epoch_end", 5, 5, id="end of an epoch"),
        pytest.param("learned", "on_train_batch_end", 7, 3, id="inside the next epoch"),
    ],
    indirect=["make_model"],
)
def test_resumed_anywhere_it_ends_bitwise_alike(
    make_model: MakeModel,
    make_trainer: Callable[..., Trainer],
    data: TextDataModule,
    tmp_path: Path,
    hook: str,
    step: int,
    validate_every: int,
) -> None:
    path = tmp_path / "middle.ckpt"
    options = {
        "vocab_size": 256,
        "dropout": 0.2,
        "optimizer": partial(torch.optim.AdamW, lr=3e-3),
        "lr_scheduler": partial(LinearWarmupCosine, max_steps=STEPS, warmup_steps=2),
    }

    def run(seed: int, ckpt_path: Path | None = None, **more: Any) -> tuple[Any, Trainer]:
        model = make_model(**options)
        torch.manual_seed(seed)
        trainer = make_trainer(max_steps=STEPS, val_check_interval=validate_every, **more)
        trainer.fit(model, make_data(tmp_path), ckpt_path=ckpt_path, weights_only=True)
        return model, trainer

    straight, first = run(1, callbacks=[SaveAt(hook, step, path)])
    resumed, second = run(2, path)
    saved = torch.load(path)
    assert saved["context"] == 16
    assert saved["tokenizer"] == data.tokenizer.to_dict()
    assert second.global_step == first.global_step == STEPS
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert not torch.equal(saved["state_dict"][name], value), name
    states = [trainer.optimizers[0].state_dict() for trainer in (second, first)]
    names = [[group.pop("param_names") for group in state["param_groups"]] for state in states]
    assert names[0] == names[1]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    rates = [trainer.lr_scheduler_configs[0].scheduler.get_last_lr() for trainer in (second, first)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("step", "hook"),
    [
        (1, "on_after_backward"),
        (5, "on_after_backward"),  # of 6 batches in an epoch
        (6, "on_after_backward"),
        (2, "on_train_batch_start"),
        (2, "on_train_batch_end"),
    ],
)
def test_a_step_that_was_interrupted_is_taken_again(
    step: int,
    hook: str,
    make_one_model: MakeModel,
    make_trainer: Callable[..., Trainer],
    data: TextDataModule,
    tmp_path: Path,
) -> None:
    def run(seed: int, ckpt_path: Path | None = None, **more: Any) -> Any:
        model = make_one_model(vocab_size=256, dropout=0.2)
        torch.manual_seed(seed)
        trainer = make_trainer(max_steps=STEPS, **more)
        trainer.fit(model, make_data(tmp_path), ckpt_path=ckpt_path, weights_only=True)
        return model

    path = tmp_path / "middle.ckpt"
    straight = run(1)
    with pytest.raises(RuntimeError, match="interrupted"):
        run(1, callbacks=[InterruptAt(step, path, hook)])
    assert torch.load(path)["global_step"] == step
    with pytest.raises(RuntimeError, match="interrupted"):
        run(3, path, callbacks=[InterruptAt(step, path, hook="on_train_start")])
    resumed = run(2, path)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_checkpoint_with_the_states_of_torch_alone_goes_on_alike(
    make_one_model: MakeModel,
    make_trainer: Callable[..., Trainer],
    data: TextDataModule,
    tmp_path: Path,
) -> None:
    """As earlier versions wrote them, of one process; and damaged ones are refused."""

    def run(seed: int, ckpt_path: Path | None = None, **more: Any) -> Any:
        model = make_one_model(vocab_size=256, dropout=0.2)
        torch.manual_seed(seed)
        trainer = make_trainer(max_steps=2, limit_val_batches=0, **more)
        trainer.fit(model, make_data(tmp_path), ckpt_path=ckpt_path, weights_only=True)
        return model

    path = tmp_path / "middle.ckpt"
    straight = run(1, callbacks=[SaveAt("on_train_batch_end", 1, path)])
    saved = torch.load(path)
    [state] = saved["random_state"]
    torch.save({**saved, "random_state": {"cpu": state["cpu"], "cuda": []}}, path)
    resumed = run(2, path)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    torch.save({**saved, "random_state": [{"cpu": 1}]}, path)
    with pytest.raises(ValueError, match="random_state is not one"):
        run(2, path)


CYCLE = partial(CyclicLR, max_lr=0.1, step_size_up=4, cycle_momentum=False)
COSINE = partial(LinearWarmupCosine, max_steps=STEPS, warmup_steps=2)


@pytest.mark.parametrize(
    ("before", "now", "named", "keeps_settings"),
    [
        pytest.param({"lr": 1e-2}, {"lr": 1e-3}, "lr was 0.01, is 0.001", True, id="rate"),
        pytest.param(
            {"lr": 1e-2, "schedule": COSINE},
            {"lr": 1e-3, "schedule": COSINE},
            "lr was 0.01, is 0.001",
            True,
            id="rate of a schedule",
        ),
        pytest.param(
            {"schedule": COSINE},
            {"schedule": partial(COSINE, warmup_steps=6)},
            "warmup_steps was 2, is 6",
            True,
            id="schedule",
        ),
        pytest.param(
            {"schedule": partial(OneCycleLR, total_steps=9, max_lr=0.1)},
            {"schedule": partial(OneCycleLR, total_steps=9, max_lr=0.01)},
            ".*max_lr was 0.1, is 0.01",
            True,
            id="schedule that keeps its settings in the groups",
        ),
        pytest.param(
            {"schedule": partial(CYCLE, base_lr=0.01)},
            {"schedule": partial(CYCLE, base_lr=0.02)},
            "lr was 0.01, is 0.02",
            True,
            id="schedule with a rate of its own",
        ),
        pytest.param(
            {"schedule": partial(CosineAnnealingLR, T_max=4)},
            {"schedule": partial(CosineAnnealingLR, T_max=9)},
            "T_max was 4, is 9",
            True,
            id="schedule of PyTorch",
        ),
        pytest.param(
            {"schedule": partial(CosineAnnealingLR, T_max=9)},
            {"schedule": COSINE},
            "lr_scheduler was .*CosineAnnealingLR, is .*LinearWarmupCosine",
            True,
            id="another schedule",
        ),
        pytest.param({"schedule": COSINE}, {}, "lr_scheduler was .*, is None", True, id="removed"),
        pytest.param({}, {"schedule": COSINE}, "lr_scheduler was None, is", True, id="added"),
        pytest.param(
            {"weight_decay": 0.1, "betas": (0.9, 0.99)},
            {"weight_decay": 0.2, "betas": (0.8, 0.99)},
            "betas was .*; weight_decay was 0.1, is 0.2",
            True,
            id="others",
        ),
        pytest.param({"lr": 1e-2}, {"lr": 1e-3}, "lr was 0.01, is 0.001", False, id="old file"),
        pytest.param(
            {"lr": 1e-2, "schedule": COSINE},
            {"lr": 1e-3, "schedule": COSINE},
            "lr was 0.01, is 0.001",
            False,
            id="old file of a schedule",
        ),
    ],
)
def test_settings_changed_on_resuming_hold_and_are_named(
    before: dict[str, Any],
    now: dict[str, Any],
    named: str,
    keeps_settings: bool,
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(steps: int, settings: dict[str, Any], ckpt_path: Path | None = None) -> Trainer:
        settings = dict(settings)
        schedule = settings.pop("schedule", None)
        optimizer = partial(torch.optim.AdamW, **settings)
        trainer = make_trainer(max_steps=steps)
        model = make_one_model(optimizer=optimizer, lr_scheduler=schedule)
        trainer.fit(model, make_loader(9), make_loader(3), ckpt_path=ckpt_path, weights_only=True)
        return trainer

    path = tmp_path / "middle.ckpt"
    run(3, before).save_checkpoint(path)
    saved = torch.load(path)
    if not keeps_settings:
        del saved["optimizer_settings"]  # as version 0.1 wrote them
        torch.save(saved, path)
    with caplog.at_level("INFO"):
        groups = run(5, now, path).optimizers[0].param_groups
    assert re.search(f"Resumed with new settings: {named}", caplog.text)
    straight = run(5, now).optimizers[0].param_groups
    for resumed, expected in zip(groups, straight, strict=True):
        for group in (resumed, expected):
            group.pop("params")
            group.setdefault("initial_lr", group["lr"])
        assert resumed == expected


def test_other_settings_leave_what_a_plateau_has_reduced(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    plateau = partial(ReduceLROnPlateau, monitor="val/loss", threshold=9, patience=0)

    def run(epochs: int, decay: float, ckpt_path: Path | None = None) -> Trainer:
        trainer = make_trainer(max_epochs=epochs)
        optimizer = partial(torch.optim.SGD, lr=0.1, weight_decay=decay)
        model = make_one_model(optimizer=optimizer, lr_scheduler=plateau)
        trainer.fit(model, make_loader(3), make_loader(3), ckpt_path=ckpt_path, weights_only=True)
        return trainer

    run(2, 0.1).save_checkpoint(path := tmp_path / "first.ckpt")
    group = run(3, 0.2, path).optimizers[0].param_groups[0]
    assert group["weight_decay"] == 0.2
    assert group["lr"] == pytest.approx(1e-4)


def test_settings_hold_where_checkpoints_are_loaded_later(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As strategies that shard do it."""

    def run(steps: int, lr: float, ckpt_path: Path | None = None) -> Trainer:
        trainer = make_trainer(max_steps=steps)
        model = make_one_model(optimizer=partial(torch.optim.SGD, lr=lr))
        trainer.fit(model, make_loader(3), make_loader(3), ckpt_path=ckpt_path, weights_only=True)
        return trainer

    run(1, 0.1).save_checkpoint(path := tmp_path / "first.ckpt")
    monkeypatch.setattr(SingleDeviceStrategy, "restore_checkpoint_after_setup", True)
    assert {group["lr"] for group in run(2, 0.2, path).optimizers[0].param_groups} == {0.2}


def test_invalid_settings_are_refused(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    first = make_trainer(max_steps=1)
    first.fit(make_one_model(), make_loader(3), make_loader(3))
    first.save_checkpoint(path := tmp_path / "first.ckpt")
    torch.save({**torch.load(path), "optimizer_settings": {"optimizer": 1}}, path)
    with pytest.raises(ValueError, match="optimizer_settings of the checkpoint are invalid"):
        make_trainer(max_steps=2).fit(
            make_one_model(), make_loader(3), make_loader(3), ckpt_path=path, weights_only=True
        )


def test_another_optimizer_is_refused(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    first = make_trainer(max_steps=1)
    first.fit(make_one_model(), make_loader(), make_loader(3))
    first.save_checkpoint(path := tmp_path / "first.ckpt")
    other = make_one_model(optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"optimizer is .*AdamW, this run's is .*SGD"):
        make_trainer(max_steps=2).fit(
            other, make_loader(), make_loader(3), ckpt_path=path, weights_only=True
        )
    make_trainer(max_steps=1).fit(other, make_loader(), make_loader(3))  # a new run is not refused

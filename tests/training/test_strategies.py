"""Strategies of Lightning, in one process."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy

from lightning_dsmoe.training.language_model import DSMoELanguageModel
from lightning_dsmoe.training.strategies import check_strategy


class TheirDDP(DDPStrategy):
    pass


def trainer_with(strategy: type) -> Any:
    """Some cannot be made without their package or device."""
    return SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=[])


@pytest.mark.parametrize(
    "strategy", [DeepSpeedStrategy, FSDPStrategy, XLAStrategy, ParallelStrategy]
)
def test_strategies_not_known_to_train_alike_are_refused_by_name(
    strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategy, "__abstractmethods__", frozenset())
    with pytest.raises(ValueError, match=f"^{strategy.__name__} is not supported; use .*DDP"):
        check_strategy(trainer_with(strategy))


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DDPStrategy, TheirDDP])
def test_others_and_what_derives_from_them_are_not(strategy: type) -> None:
    check_strategy(trainer_with(strategy))


def test_the_refusal_comes_before_any_step(
    make_one_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_dsmoe.training.strategies._SUPPORTED", DDPStrategy)
    trainer = make_trainer(max_steps=1)
    with pytest.raises(ValueError, match="SingleDeviceStrategy is not supported"):
        trainer.fit(make_one_model(), make_loader(), make_loader())
    assert trainer.global_step == 0

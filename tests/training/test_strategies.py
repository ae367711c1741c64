"""Strategies of Lightning, in one process."""

from collections.abc import Callable
from math import ceil, prod
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
from lightning_dsmoe.training.strategies import check_strategy, stack_placement


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


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("n_experts", [1, 3, 4, 8, 12])
@pytest.mark.parametrize("rows", [24, 60])
def test_stacks_are_padded_no_more_than_they_have_to_be(
    n_ranks: int, n_experts: int, rows: int
) -> None:
    def padded(axis: int) -> int:
        """Numbers in equal shards along an axis; FSDP2 pads the first one, and no other."""
        size = [n_experts, rows, 5]
        assert axis == 0 or size[axis] % n_ranks == 0
        size[axis] = ceil(size[axis] / n_ranks) * n_ranks
        return prod(size)

    placement = stack_placement((n_experts, rows, 5), n_ranks)
    chosen = padded(0 if placement is None else placement.dim)
    assert chosen == min(padded(axis) for axis in (0, 1) if axis == 0 or rows % n_ranks == 0)
    assert (placement is None) == (padded(0) == chosen)
    assert stack_placement((n_experts, rows), n_ranks) is None

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback

from lightning_dsmoe.callbacks import SparseFinishing
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK, interception
from lightning_dsmoe.routing.running import running_plan
from lightning_dsmoe.training.language_model import DSMoELanguageModel

pytestmark = pytest.mark.slow

MakeModel = Callable[..., DSMoELanguageModel]
MakeLoader = Callable[..., Any]
MakeTrainer = Callable[..., Trainer]

SPEC = SelectionPlan(experts=TopK(1), attention=TopK(1))
DENSE = SelectionPlan()
SPARSE = SelectionPlan(experts=TopK(1), attention=TopK(1))
OTHER = SelectionPlan(experts=Threshold(0.5))


class Plans(Callback):
    """Keeps the plan of every training and validation batch, and stops at a step if asked to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.training: list[SelectionPlan] = []
        self.validation: list[SelectionPlan] = []
        self.fail_at = fail_at

    def on_before_backward(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.training.append(running_plan(pl_module, pl_module.plan))
        if trainer.global_step == self.fail_at:
            raise RuntimeError("stop here")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.validation.append(running_plan(pl_module, pl_module.plan))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_last_steps_run_the_plan_and_validation_does_not(
    accumulate: int, model: DSMoELanguageModel, make_loader: MakeLoader, make_trainer: MakeTrainer
) -> None:
    plans = Plans()
    trainer = make_trainer(
        max_steps=5,
        accumulate_grad_batches=accumulate,
        val_check_interval=accumulate,
        callbacks=[SparseFinishing(SPEC, steps=2), plans],
    )
    trainer.fit(model, make_loader(5 * accumulate), make_loader(1))
    assert plans.training == [DENSE] * 3 * accumulate + [SPARSE] * 2 * accumulate
    assert plans.validation == [DENSE] * (1 + 5)
    assert model.plan == DENSE


def test_plans_alternate_from_step_to_step(
    model: DSMoELanguageModel, make_loader: MakeLoader, make_trainer: MakeTrainer
) -> None:
    plans = Plans()
    finishing = SparseFinishing(SPEC, steps=3, alternate_with=[OTHER])
    trainer = make_trainer(max_steps=4, accumulate_grad_batches=2, callbacks=[finishing, plans])
    trainer.fit(model, make_loader(8), make_loader(1))
    assert plans.training == [DENSE] * 2 + [SPARSE] * 2 + [OTHER] * 2 + [SPARSE] * 2
    assert model.plan == DENSE


@pytest.mark.parametrize(
    ("options", "n_batches", "last"),
    [
        ({"max_epochs": 2}, 6, 2),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6, 3),
        ({"max_epochs": 2, "max_steps": 5}, 5, 2),
        ({"max_steps": 4}, 4, 2),
    ],
    ids=str,
)
def test_length_of_a_run(
    options: dict[str, int],
    n_batches: int,
    last: int,
    model: DSMoELanguageModel,
    make_loader: MakeLoader,
    make_trainer: MakeTrainer,
) -> None:
    plans = Plans()
    trainer = make_trainer(**options, callbacks=[SparseFinishing(SPEC, steps=2), plans])
    trainer.fit(model, make_loader(3), make_loader(1))
    assert plans.training == [DENSE] * (n_batches - last) + [SPARSE] * last


def test_as_a_model_that_goes_on_with_these_selections(
    make_model: MakeModel, make_loader: MakeLoader, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def run(
        max_steps: int, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any
    ) -> tuple[DSMoELanguageModel, Trainer]:
        model = make_model(load_balancing_weight=0.1, **options)
        trainer = make_trainer(max_steps=max_steps, callbacks=list(callbacks))
        trainer.fit(model, make_loader(4), make_loader(1), ckpt_path=ckpt_path, weights_only=True)
        return model, trainer

    finished, trainer = run(8, SparseFinishing(SPEC, steps=4))
    _, first = run(4)
    first.save_checkpoint(tmp_path / "at_4.ckpt")
    sparse, second = run(
        8,
        ckpt_path=tmp_path / "at_4.ckpt",
        expert_selection=TopK(1),
        attention_selection=TopK(1),
    )
    straight, third = run(8)
    for name, value in sparse.state_dict().items():
        if not name.startswith("val_loss"):
            assert torch.equal(finished.state_dict()[name], value), name
    losses = [t.callback_metrics["train/loss"] for t in (trainer, second, third)]
    assert losses[0] == losses[1] != losses[2]
    assert trainer.callback_metrics["val/loss"] != second.callback_metrics["val/loss"]
    assert not torch.equal(finished.decoder.head.weight, straight.decoder.head.weight)


@pytest.mark.parametrize("at", [3, 6], ids=["before the phase", "inside the phase"])
def test_resumed_as_if_never_stopped(
    at: int,
    make_model: MakeModel,
    make_loader: MakeLoader,
    make_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    path = tmp_path / "middle.ckpt"

    def run(*callbacks: Callback, ckpt_path: Path | None = None) -> tuple[Plans, Any]:
        plans, model = Plans(), make_model()
        finishing = SparseFinishing(SPEC, steps=3, alternate_with=[OTHER])
        callbacks = (plans, finishing, *callbacks)
        trainer = make_trainer(max_steps=8, callbacks=list(callbacks))
        trainer.fit(model, make_loader(3), make_loader(1), ckpt_path=ckpt_path, weights_only=True)
        return plans, model

    def save(trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == at:
            trainer.save_checkpoint(path)

    whole, model = run(LambdaCallback(on_train_epoch_end=save))
    after, resumed = run(ckpt_path=path)
    assert whole.training == [DENSE] * 5 + [SPARSE, OTHER, SPARSE]
    assert after.training == whole.training[at:]
    for (name, expected), value in zip(
        model.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name


def test_the_plan_comes_back_after_an_exception(
    make_model: MakeModel, make_loader: MakeLoader, make_trainer: MakeTrainer
) -> None:
    model = make_model(expert_selection=Threshold(0.5))
    configured = model.plan
    plans = Plans(fail_at=2)
    callbacks = [SparseFinishing(SPEC, steps=2), plans]
    with pytest.raises(RuntimeError, match="stop here"):
        make_trainer(max_steps=4, callbacks=callbacks).fit(model, make_loader(4), make_loader(1))
    assert plans.training == [configured] * 2 + [SPARSE]
    assert model.plan == configured
    assert not interception.is_open


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (3, {"max_steps": 3}, "SparseFinishing, steps=3: must be below 3, the number of optimizer"),
        (9, {"max_epochs": 2}, "steps=9: must be below 4"),
        (2, {"max_steps": -1}, "steps=2: the last steps of a run without an end are unknown"),
    ],
)
def test_runs_without_room_for_the_phase(
    steps: int,
    options: dict[str, int],
    message: str,
    model: DSMoELanguageModel,
    make_loader: MakeLoader,
    make_trainer: MakeTrainer,
) -> None:
    plans = Plans()
    trainer = make_trainer(**options, callbacks=[SparseFinishing(SPEC, steps=steps), plans])
    with pytest.raises(ValueError, match=message):
        trainer.fit(model, make_loader(2), make_loader(1))
    assert not plans.training


def test_mistakes_end_before_training(
    model: DSMoELanguageModel, make_loader: MakeLoader, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        SparseFinishing(SPEC, steps=0)
    (tmp_path / "no_plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"SparseFinishing: .*no_plan.json"):
        SparseFinishing(str(tmp_path / "no_plan.json"), steps=1)
    loaders = make_loader(2), make_loader(1)
    wide = SparseFinishing(SelectionPlan(experts=TopK(5)), steps=1)
    with pytest.raises(ValueError, match=r"SparseFinishing: plan, experts, \S*: TopK\(k=5\)"):
        make_trainer(max_steps=2, callbacks=[wide]).fit(model, *loaders)
    wide = SparseFinishing(SPEC, steps=1, alternate_with=[SelectionPlan(experts=TopK(6))])
    with pytest.raises(ValueError, match=r"SparseFinishing: plan, experts, \S*: TopK\(k=6\)"):
        make_trainer(max_steps=2, callbacks=[wide]).fit(model, *loaders)
    two = [SparseFinishing(SPEC, steps=1), SparseFinishing(SPEC, steps=2)]
    with pytest.raises(ValueError, match="one SparseFinishing per trainer"):
        make_trainer(max_steps=3, callbacks=two).fit(model, *loaders)


def test_fast_dev_run_tries_the_plan(
    model: DSMoELanguageModel, make_loader: MakeLoader, make_trainer: MakeTrainer
) -> None:
    plans = Plans()
    trainer = make_trainer(fast_dev_run=2, callbacks=[SparseFinishing(SPEC, steps=10), plans])
    trainer.fit(model, make_loader(3), make_loader(2))
    assert plans.training == [SPARSE] * 2
    assert plans.validation == [DENSE] * 2

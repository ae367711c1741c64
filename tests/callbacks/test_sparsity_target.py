import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.callbacks import MIWeightAnnealing, SparsityTarget
from lightning_dsmoe.routing import Routing
from lightning_dsmoe.training.language_model import DSMoELanguageModel

pytestmark = pytest.mark.slow

MakeModel = Callable[..., DSMoELanguageModel]
MakeLoader = Callable[..., Any]
MakeTrainer = Callable[..., Trainer]

CONTROL = {"expert_top_k": 2, "attention_top_k": 1, "mass": 0.8, "every": 2, "delay": 3}


class Stop(Exception):
    """What interrupts a run."""


class Recorder(Callback):
    """Keeps the weights and the routing of each batch, and may stop at an epoch's start."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.weights: list[tuple[float, float]] = []
        self.outputs: list[Any] = []
        self.fail_at = fail_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any
    ) -> None:
        self.weights.append((pl_module.routing_loss.expert_mi, pl_module.routing_loss.attention_mi))
        self.outputs.append(outputs)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.fail_at:
            raise Stop("stop here")


def naive_mass(routings: list[Routing | None], k: int, masks: list[Tensor]) -> float:
    """Over every router and token that counts, the mean of the k largest probabilities' sum."""
    sums = [
        sum(sorted(probs.tolist(), reverse=True)[:k])
        for routing, mask in zip(routings, masks, strict=True)
        if routing is not None
        for probs, counts in zip(routing.probs.flatten(0, 1), mask.flatten(), strict=True)
        if counts
    ]
    return sum(sums) / len(sums)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got None and None"),
        ({"expert_top_k": 0}, "got 0 and None"),
        ({"attention_top_k": 1, "mass": 1.0}, "mass must be above 0 and at most 0.9999, got 1.0"),
        ({"attention_top_k": 1, "mass": float("nan")}, "got nan"),
        ({"attention_top_k": 1, "rate": 1.0}, "rate must be above 1, got 1.0"),
        ({"attention_top_k": 1, "every": 0}, "got 0 and 100"),
        ({"attention_top_k": 1, "delay": -1}, "got 10 and -1"),
        ({"attention_top_k": 1, "smoothing": 1.0}, "smoothing must be in"),
        ({"attention_top_k": 1, "ahead": -1.0}, "ahead must be 0 or more, got -1.0"),
        ({"attention_top_k": 1, "least": 0.0}, "got 0.0 and 100"),
        ({"attention_top_k": 1, "most": 0.9}, "got 0.01 and 0.9"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsityTarget(**options)


@pytest.mark.parametrize(
    ("options", "model_options", "message"),
    [
        ({"expert_top_k": 4}, {}, "expert_top_k=4: must be below the number of experts, 4"),
        ({"attention_top_k": 3}, {}, "attention_top_k=3: must be below .* 2"),
        (
            {"expert_top_k": 2, "mass": 0.5},
            {},
            "equal gates of 4 experts give the top 2 a mass of 0.5 already.*got 0.5",
        ),
        (
            {"attention_top_k": 1},
            {"attention": partial(GroupedQueryAttention, n_heads=2, n_kv_heads=1, d_head=4)},
            "attention_top_k=1: the model has no router of this kind",
        ),
        (
            {"expert_top_k": 1},
            {"expert_mi_weight": 0.0},
            "expert_top_k=1: the weight expert_mi of the RoutingLoss must be above 0, got 0.0",
        ),
    ],
)
def test_what_does_not_fit_the_model_ends_before_training(
    options: dict[str, Any],
    model_options: dict[str, Any],
    message: str,
    make_model: MakeModel,
    make_loader: MakeLoader,
    make_trainer: MakeTrainer,
) -> None:
    recorder = Recorder()
    trainer = make_trainer(max_steps=1, callbacks=[SparsityTarget(**options), recorder])
    with pytest.raises(ValueError, match=message):
        trainer.fit(make_model(**model_options), make_loader(1), make_loader(1))
    assert not recorder.weights


class Another(SparsityTarget):
    """Of a class of its own, which Lightning would take beside the first."""


@pytest.mark.parametrize(
    "other", [MIWeightAnnealing(steps=2), Another(expert_top_k=1)], ids=["schedule", "target"]
)
@pytest.mark.parametrize("first", [True, False])
def test_nothing_else_sets_the_weights(
    other: Callback,
    first: bool,
    model: DSMoELanguageModel,
    make_loader: MakeLoader,
    make_trainer: MakeTrainer,
) -> None:
    callbacks = [SparsityTarget(expert_top_k=2), other]
    trainer = make_trainer(callbacks=callbacks if first else callbacks[::-1])
    with pytest.raises(ValueError, match="one MIWeightAnnealing or SparsityTarget per trainer"):
        trainer.fit(model, make_loader(1), make_loader(1))


def test_two_of_them(make_trainer: MakeTrainer) -> None:
    callbacks = [SparsityTarget(expert_top_k=2), SparsityTarget(attention_top_k=1)]
    with pytest.raises(
        RuntimeError, match="more than one stateful callback of type `SparsityTarget`"
    ):
        make_trainer(callbacks=callbacks)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_follow_the_measured_mass(
    accumulate: int, make_model: MakeModel, make_loader: MakeLoader, make_trainer: MakeTrainer
) -> None:
    model = make_model(expert_mi_weight=0.2, attention_mi_weight=0.1)
    target = SparsityTarget(**CONTROL, smoothing=0.25, rate=1.3, ahead=2)
    recorder = Recorder()
    trainer = make_trainer(
        max_steps=7, accumulate_grad_batches=accumulate, callbacks=[target, recorder]
    )
    trainer.fit(model, make_loader(4), make_loader(1))

    kinds = (("experts", 2, 0.2), ("attention", 1, 0.1))
    for place, (kind, k, configured) in enumerate(kinds):
        weights, factor, mass = [], 1.0, None
        for step in range(1, 8):
            weights += [factor * configured] * accumulate
            if step % 2:
                continue
            outputs = recorder.outputs[(step - 1) * accumulate : step * accumulate]
            routings = [r for out in outputs for r in getattr(out["routings"], kind)]
            masks = [out["mask"] for out in outputs for _ in range(2)]
            measured = naive_mass(routings, k, masks)
            before = measured if mass is None else mass
            mass = 0.25 * before + 0.75 * measured
            if step >= 3:
                error = math.log((1 - mass) / (1 - 0.8))
                error += 2 * math.log((1 - mass) / (1 - before))
                factor *= 1.3 ** max(-1, min(1, error))
        assert [pair[place] for pair in recorder.weights] == pytest.approx(weights, rel=1e-5)
        assert trainer.callback_metrics[f"train/{kind}/top_mass"].item() == pytest.approx(mass)
    assert (model.routing_loss.expert_mi, model.routing_loss.attention_mi) == (0.2, 0.1)
    assert len({round(pair[0], 9) for pair in recorder.weights}) == 3


def test_one_kind_alone_and_bounds(
    make_model: MakeModel, make_loader: MakeLoader, make_trainer: MakeTrainer
) -> None:
    model = make_model(expert_mi_weight=0.2, attention_mi_weight=0.0)
    target = SparsityTarget(expert_top_k=1, mass=0.999, rate=1.5, every=1, delay=0, most=2)
    recorder = Recorder()
    trainer = make_trainer(max_steps=5, callbacks=[target, recorder])
    trainer.fit(model, make_loader(5), make_loader(1))
    expected = [(0.2 * factor, 0.0) for factor in (1, 1.5, 2, 2, 2)]
    assert recorder.weights == [pytest.approx(pair) for pair in expected]
    header, *rows = (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    assert {"train/expert_mi_weight", "train/experts/top_mass"} <= set(names)
    assert not {"train/attention_mi_weight", "train/attention/top_mass"} & set(names)
    logged = [row.split(",")[names.index("train/expert_mi_weight")] for row in rows]
    assert [float(value) for value in logged if value] == pytest.approx([0.3, 0.4, 0.4, 0.4, 0.4])


def test_tokens_that_do_not_count_change_nothing(
    model: DSMoELanguageModel, make_trainer: MakeTrainer
) -> None:
    labels = torch.full((6,), -100)
    items = [{"input_ids": torch.zeros(6, dtype=torch.long), "labels": labels}] * 2
    recorder = Recorder()
    options = {"expert_top_k": 1, "every": 1, "delay": 0}
    trainer = make_trainer(max_steps=2, callbacks=[SparsityTarget(**options), recorder])
    loader: Any = torch.utils.data.DataLoader(items)
    trainer.fit(model, loader, loader)
    assert recorder.weights == [(model.routing_loss.expert_mi, model.routing_loss.attention_mi)] * 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "saving",
    [
        pytest.param({"every_n_train_steps": 7}, id="between steps"),
        pytest.param({"save_on_exception": True}, id="on an exception"),
        pytest.param(None, id="after the run"),
    ],
)
def test_resumed_at_step_7_is_as_if_never_stopped(
    saving: dict[str, Any] | None,
    make_model: MakeModel,
    make_loader: MakeLoader,
    make_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    def run(
        max_steps: int, *, ckpt_path: Path | None = None, fail_at: int | None = None
    ) -> tuple[Trainer, Recorder, Any, SparsityTarget]:
        recorder, model, target = Recorder(fail_at), make_model(), SparsityTarget(**CONTROL)
        folder = tmp_path / f"{fail_at} {ckpt_path is None}"
        checkpoint = [] if saving is None else [ModelCheckpoint(folder, **saving)]
        trainer = make_trainer(
            max_steps=max_steps,
            callbacks=[target, recorder, *checkpoint],
            enable_checkpointing=saving is not None,
        )
        with contextlib.suppress(Stop):
            trainer.fit(
                model, make_loader(7), make_loader(1), ckpt_path=ckpt_path, weights_only=True
            )
        return trainer, recorder, model, target

    _, whole, model, target = run(21)
    if saving is None:
        first, before, *_ = run(7)
        path = tmp_path / "at_7.ckpt"
        first.save_checkpoint(path)
    else:
        _, before, *_ = run(21, fail_at=7)
        [path] = tmp_path.glob("7 True/*.ckpt")
    _, after, resumed, resumed_target = run(21, ckpt_path=path)

    assert len(whole.weights) == 21
    assert len({weights for weights, _ in whole.weights}) == 10
    assert before.weights + after.weights == whole.weights
    assert resumed_target.state_dict() == target.state_dict()
    for (name, expected), value in zip(
        model.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name


def test_weights_come_back_after_an_exception(
    model: DSMoELanguageModel, make_loader: MakeLoader, make_trainer: MakeTrainer
) -> None:
    configured = (model.routing_loss.expert_mi, model.routing_loss.attention_mi)
    recorder = Recorder(fail_at=5)
    callbacks = [SparsityTarget(**CONTROL), recorder]
    with pytest.raises(Stop, match="stop here"):
        make_trainer(max_steps=6, callbacks=callbacks).fit(model, make_loader(5), make_loader(1))
    assert recorder.weights[-1][0] != configured[0]
    assert recorder.weights[-1][1] != configured[1]
    assert (model.routing_loss.expert_mi, model.routing_loss.attention_mi) == configured


def test_another_fit_begins_at_the_configured_weights(
    make_model: MakeModel, make_loader: MakeLoader, make_trainer: MakeTrainer
) -> None:
    target = SparsityTarget(**CONTROL)
    runs = []
    for _ in range(2):
        recorder = Recorder()
        make_trainer(max_steps=6, callbacks=[target, recorder]).fit(
            make_model(), make_loader(6), make_loader(1)
        )
        runs.append(recorder.weights)
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][-1]


def test_a_state_of_more_kinds_than_are_controlled(model: DSMoELanguageModel) -> None:
    both = SparsityTarget(expert_top_k=1, attention_top_k=1)
    both.load_state_dict(
        {"factors": {"experts": 2.0, "attention": 3.0}, "masses": {"attention": 0.5}}
    )
    attention = SparsityTarget(attention_top_k=1)
    attention.load_state_dict(both.state_dict())
    assert attention.state_dict() == {"factors": {"attention": 3.0}, "masses": {"attention": 0.5}}
    experts = SparsityTarget(expert_top_k=1)
    experts.load_state_dict(attention.state_dict())
    assert experts.state_dict() == {"factors": {"experts": 1.0}, "masses": {}}


def test_fast_dev_run(
    model: DSMoELanguageModel, make_loader: MakeLoader, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(fast_dev_run=2, callbacks=[SparsityTarget(expert_top_k=1)])
    trainer.fit(model, make_loader(3), make_loader(2))
    assert trainer.global_step == 2


def test_options_that_are_set_later_control_too() -> None:
    target = SparsityTarget(**CONTROL)
    assert target.controller.next_factor(1.0, 0.2, 0.2) == target.rate
    target.rate = 1.25
    assert target.controller.next_factor(1.0, 0.2, 0.2) == 1.25

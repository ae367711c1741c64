import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Callback, Trainer

from lightning_dsmoe.callbacks import MIWeightAnnealing
from lightning_dsmoe.callbacks.mi_weight_annealing import Schedule
from lightning_dsmoe.training.language_model import DSMoELanguageModel

pytestmark = pytest.mark.slow

schedules = st.sampled_from(["linear", "cosine", "constant_then_ramp"])
factors = st.floats(0, 10)


class WeightRecorder(Callback):
    """Keeps the weights of each batch, and those at which an optimizer step stood."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.weights: list[tuple[float, float]] = []
        self.fail_at = fail_at

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.weights.append((pl_module.routing_loss.expert_mi, pl_module.routing_loss.attention_mi))
        if trainer.global_step == self.fail_at:
            raise RuntimeError("stop here")


@given(
    schedule=schedules,
    start=factors,
    end=factors,
    steps=st.integers(1, 50),
    delay=st.integers(1, 20),
)
def test_goes_from_start_to_end_without_turning_back(
    schedule: Schedule, start: float, end: float, steps: int, delay: int
) -> None:
    delay = delay if schedule == "constant_then_ramp" else 0
    annealing = MIWeightAnnealing(schedule=schedule, start=start, end=end, steps=steps, delay=delay)
    values = [annealing.factor(step) for step in range(delay + steps + 3)]
    assert values[: delay + 1] == [start] * (delay + 1)
    assert values[delay + steps :] == pytest.approx([end] * 3)
    assert min(start, end) - 1e-9 <= min(values)
    assert max(values) <= max(start, end) + 1e-9
    rises = [later - earlier for earlier, later in itertools.pairwise(values)]
    sign = 1 if end >= start else -1
    assert all(sign * rise >= -1e-9 for rise in rises)


@pytest.mark.parametrize(
    ("schedule", "delay", "expected"),
    [
        ("linear", 0, [2.0, 1.75, 1.5, 1.25, 1.0]),
        ("cosine", 0, [2.0, 1.5 + 0.5**1.5, 1.5, 1.5 - 0.5**1.5, 1.0]),
        ("constant_then_ramp", 2, [2.0, 2.0, 2.0, 1.75, 1.5]),
    ],
)
def test_shapes(schedule: Schedule, delay: int, expected: list[float]) -> None:
    annealing = MIWeightAnnealing(schedule=schedule, start=2.0, end=1.0, steps=4, delay=delay)
    assert [annealing.factor(step) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 5, "schedule": "step"}, "got 'step'"),
        ({"steps": 5, "start": -0.5}, "got start=-0.5"),
        ({"steps": 5, "end": float("nan")}, "end=nan"),
        ({"steps": 5, "delay": 3}, "got delay=3 for linear"),
        ({"steps": 5, "schedule": "constant_then_ramp"}, "got delay=0 for constant_then_ramp"),
        ({"steps": 5, "schedule": "constant_then_ramp", "delay": -1}, "got delay=-1"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIWeightAnnealing(**options)


def test_scales_both_weights_and_gives_them_back(
    make_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    model = make_model(expert_mi_weight=0.2, attention_mi_weight=0.1)
    recorder = WeightRecorder()
    trainer = make_trainer(max_steps=6, callbacks=[MIWeightAnnealing(steps=4), recorder])
    trainer.fit(model, make_loader(6), make_loader(1))
    ramp = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [weights[0] for weights in recorder.weights] == pytest.approx([0.2 * f for f in ramp])
    assert [weights[1] for weights in recorder.weights] == pytest.approx([0.1 * f for f in ramp])
    assert (model.routing_loss.expert_mi, model.routing_loss.attention_mi) == (0.2, 0.1)
    logged = (Path(trainer.log_dir) / "metrics.csv").read_text()
    assert "train/expert_mi_weight" in logged.splitlines()[0]
    assert trainer.callback_metrics["train/attention_mi_weight"] == torch.tensor(0.1)


def test_counts_optimizer_steps_not_batches(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    recorder = WeightRecorder()
    trainer = make_trainer(
        max_steps=3, accumulate_grad_batches=2, callbacks=[MIWeightAnnealing(steps=2), recorder]
    )
    trainer.fit(model, make_loader(6), make_loader(1))
    base = model.routing_loss.expert_mi
    ramp = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert [weight for weight, _ in recorder.weights] == pytest.approx([base * f for f in ramp])


def test_resumed_at_step_7_is_as_if_never_stopped(
    make_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    def run(max_steps: int, ckpt_path: Path | None = None) -> tuple[Trainer, WeightRecorder, Any]:
        recorder, model = WeightRecorder(), make_model()
        annealing = MIWeightAnnealing(schedule="cosine", steps=20)
        trainer = make_trainer(max_steps=max_steps, callbacks=[annealing, recorder])
        trainer.fit(model, make_loader(7), make_loader(1), ckpt_path=ckpt_path, weights_only=True)
        return trainer, recorder, model

    _, whole, model = run(21)
    first, before, _ = run(7)
    first.save_checkpoint(tmp_path / "at_7.ckpt")
    _, after, resumed = run(21, tmp_path / "at_7.ckpt")

    assert len(whole.weights) == 21
    assert before.weights + after.weights == whole.weights
    for (name, expected), value in zip(
        model.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name


def test_weights_come_back_after_an_exception(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    base = model.routing_loss.expert_mi
    annealing = MIWeightAnnealing(steps=10)
    recorder = WeightRecorder(fail_at=3)
    with pytest.raises(RuntimeError, match="stop here"):
        make_trainer(max_steps=6, callbacks=[annealing, recorder]).fit(
            model, make_loader(6), make_loader(1)
        )
    assert recorder.weights[-1][0] == pytest.approx(0.2 * base)
    assert model.routing_loss.expert_mi == base


def test_one_per_trainer(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    callbacks = [MIWeightAnnealing(steps=1), MIWeightAnnealing(steps=2)]
    with pytest.raises(ValueError, match="got MIWeightAnnealing and MIWeightAnnealing"):
        make_trainer(callbacks=callbacks).fit(model, make_loader(1), make_loader(1))


def test_fast_dev_run(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer(fast_dev_run=2, callbacks=[MIWeightAnnealing(steps=2)])
    trainer.fit(model, make_loader(3), make_loader(2))
    assert trainer.global_step == 2

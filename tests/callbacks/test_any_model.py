"""Every callback on a LightningModule that knows of routed layers and `RoutingLoss` alone."""

import contextlib
import csv
import gc
import inspect
import random
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe import (
    MixtureOfExperts,
    RoutingLoss,
    SelectionPlan,
    Threshold,
    TopK,
    load_sparse,
    record_routings,
    routed_layers,
    run_plan,
)
from lightning_dsmoe.callbacks import (
    ExpertUtilizationMonitor,
    MIWeightAnnealing,
    SparseCompile,
    SparseEvaluation,
    SparseFinishing,
    SparsityTarget,
)
from lightning_dsmoe.metrics import active_parameters, count_parameters, expert_utilization
from lightning_dsmoe.routing import interception
from lightning_dsmoe.routing.running import running_plan

from .classifier import Classifier, classifier, loader

pytestmark = pytest.mark.slow

MakeTrainer = Callable[..., Trainer]

TOP_1 = SelectionPlan(experts=TopK(1))
LAYERS = ["encoder.blocks.0.1.layer", "encoder.blocks.1.1.layer"]
EXCEPT = SelectionPlan(experts=TopK(1), layers={LAYERS[1]: Threshold(0.9)})


def open_plan(model: torch.nn.Module) -> SelectionPlan | None:
    own = SelectionPlan()
    found = running_plan(model, own)
    return None if found is own else found


def metrics(trainer: Trainer) -> list[dict[str, str]]:
    with (Path(str(trainer.log_dir)) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def reached(model: Classifier, n: int, plan: SelectionPlan | None) -> dict[str, float]:
    """Loss, accuracy and active share of all sequences at once."""
    tokens, labels = next(iter(loader(n, n, seed=1)))
    running = contextlib.nullcontext() if plan is None else run_plan(model, plan)
    with torch.no_grad(), running, record_routings(model) as record:
        logits = model(tokens)
    share = active_parameters(count_parameters(model), record.active_masks())
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        "active_share": share.mean.item(),
    }


def test_a_module_needs_at_most_five_lines() -> None:
    source = inspect.getsource(Classifier).splitlines()
    marked = [line for line in source if "  # " in line]
    assert 0 < len(marked) <= 5
    assert "outing" not in "".join(line for line in source if line not in marked)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_plans_beside_the_dense_run(stage: str, make_trainer: MakeTrainer) -> None:
    model = classifier()
    evaluation = SparseEvaluation({"top_1": TOP_1, "mixed": EXCEPT})
    trainer = make_trainer(callbacks=[evaluation])
    run = trainer.validate if stage == "val" else trainer.test
    (logged,) = run(model, loader(10, seed=1), verbose=False)
    dense = reached(model, 10, None)
    assert logged[f"{stage}/accuracy"] == pytest.approx(dense["accuracy"])
    for name, plan in (("top_1", TOP_1), ("mixed", EXCEPT)):
        sparse = reached(model, 10, plan)
        for key, value in sparse.items():
            assert logged[f"{stage}/sparse/{name}/{key}"] == pytest.approx(value, rel=1e-5), key
        result = evaluation.results[name]
        gap = sparse["loss"] / dense["loss"] - 1
        assert abs(gap) > 1e-4
        assert result.sparse_loss == pytest.approx(sparse["loss"], rel=1e-5)
        assert result.dense_loss == pytest.approx(dense["loss"], rel=1e-5)
        assert result.relative_gap == pytest.approx(gap, rel=1e-3)
        assert logged[f"{stage}/sparse/{name}/gap"] == pytest.approx(gap, rel=1e-3)
    assert reached(model, 10, TOP_1)["active_share"] != reached(model, 10, EXCEPT)["active_share"]


class Restless(Classifier):
    """Its steps leave traces everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.by_label: dict[int, int] = {}
        self.labels: set[int] = set()
        self.steps = 0
        self.drawn: list[float] = []

    def evaluate(self, batch: Any, split: str) -> Any:
        super().evaluate((batch["tokens"], batch.pop("labels")), split)
        self.steps += 1
        noise = [torch.rand(()).item(), random.random(), np.random.rand()]
        self.drawn += noise
        self.seen.append(batch["tokens"])
        self.by_label[self.steps] = len(self.seen)
        self.labels.add(self.steps)
        self.logger.log_metrics({f"{split}/direct": float(self.steps)}, step=self.steps)
        self.log(f"{split}/noise", noise[0], batch_size=1, reduce_fx="max")
        self.log_dict({f"{split}/steps": float(self.steps), "own": 1.0}, batch_size=1)

    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        self.evaluate(batch, "val")

    def test_step(self, batch: Any) -> None:  # type: ignore[override]
        self.evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self.log("val/by_hand", self.accuracy.compute())
        self.log("val/list", float(len(self.seen)))


class Named(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, n: int) -> None:
        self.items = loader(n).dataset

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, label = self.items[index]
        return {"tokens": tokens, "labels": label}


def test_the_dense_run_is_not_disturbed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """A fit with validations is in all it logs, draws and keeps as without the callback."""

    def run(*callbacks: Callback) -> tuple[Restless, list[dict[str, str]], dict[str, Tensor]]:
        torch.manual_seed(3)
        random.seed(4)
        np.random.seed(5)
        model = Restless()
        trainer = make_trainer(
            max_steps=6, val_check_interval=3, callbacks=list(callbacks), num_sanity_val_steps=1
        )
        named: Any = torch.utils.data.DataLoader(Named(6), 2)
        trainer.fit(model, loader(12, 2), named)
        rows = [{k: v for k, v in row.items() if "/sparse/" not in k} for row in metrics(trainer)]
        return model, rows, trainer.callback_metrics

    alone, rows, logged = run()
    model, other_rows, other_logged = run(SparseEvaluation({"top_1": TOP_1, "mixed": EXCEPT}))
    assert other_rows == rows
    assert len(rows) > 6
    assert {k: v for k, v in other_logged.items() if "/sparse/" not in k} == logged
    for name in ("drawn", "by_label", "labels", "steps"):
        assert getattr(model, name) == getattr(alone, name) != type(getattr(model, name))()
    assert len(model.seen) == len(alone.seen) == 1 + 2 * 3
    assert "log" not in vars(model)
    for name, value in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert other_logged["val/sparse/top_1/own"] == 1
    assert other_logged["val/sparse/top_1/steps"] == other_logged["val/steps"] + 1
    assert other_logged["val/sparse/top_1/noise"] != 0


def test_attributes_come_back_after_a_step_that_fails(make_trainer: MakeTrainer) -> None:
    class Fails(Classifier):
        def evaluate(self, batch: Any, split: str) -> None:
            self.tries.append(open_plan(self))
            super().evaluate(batch, split)
            if open_plan(self) is not None:
                raise RuntimeError("not under a plan")

    model = Fails()
    model.tries = []
    accuracy = model.accuracy
    trainer = make_trainer(callbacks=[SparseEvaluation({"top_1": TOP_1})])
    loggers = trainer.loggers
    with pytest.raises(RuntimeError, match="not under a plan"):
        trainer.validate(model, loader(4), verbose=False)
    assert model.tries == [None]
    assert model.accuracy is accuracy
    assert "log" not in vars(model)
    assert trainer.loggers is loggers
    assert not interception.is_open


def test_of_several_loaders_each(make_trainer: MakeTrainer) -> None:
    class Several(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            self.log("val/right", (logits.argmax(-1) == batch[1]).float().mean())
            return loss

    torch.manual_seed(3)
    model = Several()
    evaluation = SparseEvaluation({"top_1": TOP_1})
    trainer = make_trainer(callbacks=[evaluation, ExpertUtilizationMonitor()])
    logged = trainer.validate(model, [loader(10, seed=1), loader(6, 3, seed=1)], verbose=False)
    for index, n in enumerate((10, 6)):
        end = f"/dataloader_idx_{index}"
        dense, sparse = reached(model, n, None), reached(model, n, TOP_1)
        assert logged[index][f"val/right{end}"] == pytest.approx(dense["accuracy"])
        assert logged[index][f"val/sparse/top_1/right{end}"] == pytest.approx(sparse["accuracy"])
        for key, value in (("loss", sparse["loss"]), ("active_share", sparse["active_share"])):
            found = logged[index][f"val/sparse/top_1/{key}{end}"]
            assert found == pytest.approx(value, rel=1e-5)
        result = evaluation.results[f"top_1{end}"]
        assert result.dense_loss == pytest.approx(dense["loss"], rel=1e-5)
        assert result.sparse_loss == pytest.approx(sparse["loss"], rel=1e-5)
    assert len(evaluation.results) == 2


def test_a_step_without_a_loss(make_trainer: MakeTrainer) -> None:
    class Silent(Classifier):
        def evaluate(self, batch: Any, split: str) -> None:
            self.log("right", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    evaluation = SparseEvaluation({"top_1": TOP_1})
    trainer = make_trainer(callbacks=[evaluation])
    (logged,) = trainer.validate(Silent(), loader(4), verbose=False)
    assert set(logged) == {"right", "val/sparse/top_1/right", "val/sparse/top_1/active_share"}
    result = evaluation.results["top_1"]
    assert result.sparse_loss != result.sparse_loss
    assert result.active_share_mean == pytest.approx(logged["val/sparse/top_1/active_share"])


@pytest.mark.filterwarnings("ignore:SparseEvaluation finds no active share")
def test_layers_that_are_called_in_other_ways(make_trainer: MakeTrainer) -> None:
    """One twice, one for other tokens, one never; and back to what has a share again."""

    class Odd(Classifier):
        def evaluate(self, batch: Any, split: str) -> None:
            x_BTD = self.encoder.embedding(batch[0])
            for _ in range(self.calls):
                x_BTD = self.encoder.blocks[0](x_BTD)
            if self.pooled:
                x_BTD = self.encoder.blocks[1](x_BTD[:, :1])
            self.log("mean", x_BTD.mean())

    def shares(calls: int, pooled: bool) -> dict[str, float]:
        torch.manual_seed(3)
        model = Odd()
        model.calls, model.pooled = calls, pooled
        trainer = make_trainer(
            callbacks=[SparseEvaluation({"top_1": TOP_1}), ExpertUtilizationMonitor()]
        )
        (logged,) = trainer.validate(model, loader(4), verbose=False)
        return {name: value for name, value in logged.items() if "share" in name}

    def expected(calls: int) -> dict[str, object]:
        """Of the first layer those experts that a token meets in any call; of the second none."""
        torch.manual_seed(3)
        encoder = Odd().encoder
        x_BTD = encoder.embedding(torch.cat([tokens for tokens, _ in loader(4)]))
        met = torch.zeros(*x_BTD.shape[:2], 4, dtype=torch.bool)
        with torch.no_grad(), run_plan(encoder, TOP_1):
            for _ in range(calls):
                with record_routings(encoder) as record:
                    x_BTD = encoder.blocks[0](x_BTD)
                (routing,) = record.routings.values()
                met |= F.one_hot(routing.probs.argmax(-1), 4).bool()
        counts = count_parameters(Odd())
        active = counts.always + met.sum(-1).float().mean() * counts.layers[LAYERS[0]].per_expert
        return {"val/sparse/top_1/active_share": pytest.approx(active.item() / counts.hidden)}

    assert shares(1, False) == expected(1)
    assert shares(2, False) == expected(2)
    assert expected(1) != expected(2)
    assert shares(1, True) == {}


def test_utilization_by_the_names_of_layers(make_trainer: MakeTrainer) -> None:
    recorded: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    model = classifier()
    for name, layer in routed_layers(model).items():

        def keep(_: Any, __: Any, output: Any, name: str = name) -> None:
            if model.training:
                recorded[name].append(output.routing.probs.detach())

        layer.register_forward_hook(keep)
    monitor = ExpertUtilizationMonitor(every_n_steps=4, window=2)
    trainer = make_trainer(max_steps=5, callbacks=[monitor])
    trainer.fit(model, loader(20), loader(8, seed=1))
    for number, name in enumerate(LAYERS):
        expected = expert_utilization(torch.cat(recorded[name][2:4]))
        torch.testing.assert_close(monitor.results["train"]["experts"][name], expected)
        logged = trainer.callback_metrics[f"train/experts/{name}/effective"]
        torch.testing.assert_close(logged, expected.effective)
        assert f"val/experts/{name}/dead" in trainer.callback_metrics, number
    assert monitor.results["train"]["attention"] == {}
    assert list(Path(str(trainer.log_dir), "utilization").glob("val_step_*.png"))


def test_tokens_that_do_not_count(make_trainer: MakeTrainer) -> None:
    class Padded(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "mask": batch[0] != 0}

    def results(model: Classifier) -> Any:
        monitor = ExpertUtilizationMonitor(every_n_steps=1, window=1)
        make_trainer(max_steps=1, limit_val_batches=0, callbacks=[monitor]).fit(
            model, loader(8, 8), loader(4)
        )
        return monitor.results["train"]["experts"][LAYERS[0]]

    torch.manual_seed(3)
    model = Padded()
    tokens = next(iter(loader(8, 8)))[0]
    with record_routings(model) as record:
        model(tokens)
    probs = record.routings[LAYERS[0]].probs
    torch.testing.assert_close(results(model), expert_utilization(probs, tokens != 0))


def test_no_graph_outlives_its_batch(make_trainer: MakeTrainer) -> None:
    alive: list[weakref.ref[Tensor]] = []
    counts = []

    class Watch(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            gc.collect()
            counts.append(sum(ref() is not None for ref in alive))
            assert not interception.is_open

    model = classifier()
    routed_layers(model)[LAYERS[0]].register_forward_hook(
        lambda _, __, output: alive.append(weakref.ref(output.routing.probs))
    )
    target = SparsityTarget(expert_top_k=1, every=1, delay=0, mass=0.9)
    callbacks = [ExpertUtilizationMonitor(every_n_steps=2, window=2), target, Watch()]
    trainer = make_trainer(max_steps=3, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(model, loader(12), loader(4))
    assert counts == [0, 0, 0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_finishing_and_annealing(accumulate: int, make_trainer: MakeTrainer) -> None:
    plans, weights, logged = [], [], []
    model = classifier()

    def watch(trainer: Trainer, pl_module: Any, *_: Any) -> None:
        plans.append(open_plan(pl_module))
        weights.append(pl_module.routing_loss.expert_mi)

    def validated(trainer: Trainer, pl_module: Any, *_: Any) -> None:
        logged.append(open_plan(pl_module))

    watching = LambdaCallback(on_before_backward=watch, on_validation_batch_end=validated)
    callbacks = [
        ExpertUtilizationMonitor(every_n_steps=1, window=1),
        SparseFinishing(TOP_1, steps=2),
        MIWeightAnnealing(steps=2),
        watching,
    ]
    trainer = make_trainer(
        max_steps=4,
        accumulate_grad_batches=accumulate,
        val_check_interval=accumulate,
        callbacks=callbacks,
    )
    trainer.fit(model, loader(16 * accumulate), loader(4))
    none = [None] * 2 * accumulate
    assert plans == none + [TOP_1] * 2 * accumulate
    assert weights == [f * 0.2 for f in (0, 0.5, 1, 1) for _ in range(accumulate)]
    assert set(logged) == {None}
    assert model.routing_loss.expert_mi == 0.2
    assert trainer.callback_metrics["train/expert_mi_weight"] == torch.tensor(0.2)
    assert not interception.is_open


def test_training_under_a_plan_is_training_with_its_selections(make_trainer: MakeTrainer) -> None:
    class Sparse(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with run_plan(self, TOP_1):
                return super().training_step(batch, batch_idx)

    def trained(model: Classifier, *callbacks: Callback) -> dict[str, Tensor]:
        trainer = make_trainer(max_steps=3, callbacks=list(callbacks), limit_val_batches=0)
        trainer.fit(model, loader(12), loader(4))
        return model.state_dict()

    torch.manual_seed(3)
    expected = trained(Sparse())
    found = trained(classifier(), _AllSteps(TOP_1, steps=1))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class _AllSteps(SparseFinishing):
    """A phase that begins with the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = 0


def test_a_target_resumed_is_as_if_never_stopped(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(max_steps: int, ckpt_path: Path | None = None) -> tuple[Trainer, Classifier, Any]:
        target = SparsityTarget(expert_top_k=1, mass=0.95, every=2, delay=1, rate=1.5)
        weights: list[float] = []
        watch = LambdaCallback(
            on_train_batch_end=lambda *a: weights.append(a[1].routing_loss.expert_mi)
        )
        trainer = make_trainer(max_steps=max_steps, callbacks=[target, watch])
        model = classifier()
        trainer.fit(model, loader(20), loader(4), ckpt_path=ckpt_path, weights_only=True)
        assert model.routing_loss.expert_mi == 0.2
        return trainer, model, weights

    _, whole, weights = run(10)
    first, _, before = run(5)
    first.save_checkpoint(tmp_path / "at_5.ckpt")
    _, resumed, after = run(10, tmp_path / "at_5.ckpt")
    assert before + after == weights
    assert len(set(weights)) == 5
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_mass_is_that_of_all_accumulated_tokens(make_trainer: MakeTrainer) -> None:
    def mass(accumulate: int) -> float:
        target = SparsityTarget(expert_top_k=1, mass=0.95, every=1, delay=0)
        trainer = make_trainer(
            max_steps=1, accumulate_grad_batches=accumulate, callbacks=[target], max_epochs=1
        )
        trainer.fit(classifier(), loader(12, 12 // accumulate), loader(4))
        return trainer.callback_metrics["train/experts/top_mass"].item()

    model = classifier()
    with record_routings(model) as record:
        model(next(iter(loader(12, 12)))[0])
    expected = torch.stack([r.probs.amax(-1) for r in record.routings.values()]).mean().item()
    assert mass(1) == pytest.approx(expected, rel=1e-6)
    assert mass(3) == pytest.approx(expected, rel=1e-6)


def test_fast_dev_run(make_trainer: MakeTrainer) -> None:
    callbacks = [
        ExpertUtilizationMonitor(every_n_steps=1, window=1),
        SparsityTarget(expert_top_k=1),
        SparseFinishing(TOP_1, steps=5),
        SparseEvaluation({"top_1": TOP_1}),
    ]
    trainer = make_trainer(fast_dev_run=2, callbacks=callbacks)
    trainer.fit(classifier(), loader(12), loader(8))
    assert trainer.global_step == 2
    assert "val/sparse/top_1/accuracy" in trainer.callback_metrics
    trainer.test(classifier(), loader(8), verbose=False)
    assert "test/sparse/top_1/accuracy" in trainer.callback_metrics


class Two(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.ModuleDict({"loss": RoutingLoss()})


class Without(Classifier):
    def __init__(self) -> None:
        super().__init__()
        del self.routing_loss


UNKNOWN = SelectionPlan(layers={"blocks.7.mlp": TopK(1)})
PLANNED = (
    (lambda plan: SparseEvaluation({"p": plan}), "SparseEvaluation, 'p'"),
    (lambda plan: SparseFinishing(plan, steps=1), "SparseFinishing"),
)


@pytest.mark.parametrize(
    ("callback", "model", "message"),
    [
        *(
            (callback, model, message)
            for callback in (MIWeightAnnealing(steps=1), SparsityTarget(expert_top_k=1))
            for model, message in (
                (
                    Without,
                    f"{type(callback).__name__}: Without has no RoutingLoss: add "
                    "`self.routing_loss = RoutingLoss()` and add it to the loss",
                ),
                (
                    Two,
                    f"{type(callback).__name__} sets the weights of one RoutingLoss, and Two has "
                    "more: routing_loss, other.loss",
                ),
            )
        ),
        *(
            (make(UNKNOWN), Classifier, f"{owner}: plan: the model has no routed layer 'blocks.7")
            for make, owner in PLANNED
        ),
        *(
            (make(SelectionPlan(TopK(5))), Classifier, f"{owner}: plan, experts, {LAYERS[0]}: TopK")
            for make, owner in PLANNED
        ),
    ],
)
def test_what_a_module_lacks_is_one_line_before_the_first_batch(
    callback: Callback, model: type[Classifier], message: str, make_trainer: MakeTrainer
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a batch ran")

    watch = LambdaCallback(on_train_batch_start=fail, on_validation_batch_start=fail)
    trainer = make_trainer(max_steps=2, callbacks=[callback, watch])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
        trainer.fit(model(), loader(8), loader(4))


def test_weights_come_back_after_an_exception(make_trainer: MakeTrainer) -> None:
    class Stops(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise KeyError("stop here")
            return super().training_step(batch, batch_idx)

    model = Stops()
    callbacks = [
        MIWeightAnnealing(steps=10),
        ExpertUtilizationMonitor(every_n_steps=1, window=1),
        _AllSteps(TOP_1, steps=2),
    ]
    with pytest.raises(KeyError, match="stop here"):
        make_trainer(max_steps=5, callbacks=callbacks).fit(model, loader(20), loader(4))
    assert model.routing_loss.expert_mi == 0.2
    assert not interception.is_open


def test_the_sparse_model_is_that_of_the_module(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = classifier()
    compiling = SparseCompile(EXCEPT, path=str(tmp_path / "here"))
    make_trainer(max_steps=2, callbacks=[compiling]).fit(model, loader(8), loader(4))
    assert compiling.artifact == tmp_path / "here"
    loaded = load_sparse(compiling.artifact, model=Classifier())
    tokens = next(iter(loader(8, 8)))[0]
    with torch.no_grad(), run_plan(model.eval(), EXCEPT):
        torch.testing.assert_close(loaded(tokens), model(tokens), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("options", [{"tune": True}, {"quantize_head": True}])
def test_options_for_language_models(options: dict[str, bool], make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=1, callbacks=[SparseCompile(TOP_1, **options)])
    with pytest.raises(ValueError, match=r"tune and quantize_head are for .*, got a Classifier$"):
        trainer.fit(classifier(), loader(4), loader(4))


def test_layers_that_are_built_late(make_trainer: MakeTrainer) -> None:
    """As `configure_model` builds them for a sharded model."""

    class Late(Classifier):
        def configure_model(self) -> None:
            if not isinstance(self.head, torch.nn.Sequential):
                self.head = torch.nn.Sequential(self.head)
                self.encoder.blocks[0][1].layer = MixtureOfExperts(8, 4, 5)

    trainer = make_trainer(max_steps=2, callbacks=[SparseEvaluation({"top_1": TOP_1})])
    trainer.fit(Late(), loader(8), loader(4))
    assert "val/sparse/top_1/gap" in trainer.callback_metrics

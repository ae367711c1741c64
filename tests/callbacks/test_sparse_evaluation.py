import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch.nn import functional as F

from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.callbacks import SparseEvaluation, SparseResult
from lightning_dsmoe.experts import FeedForward
from lightning_dsmoe.metrics import count_parameters
from lightning_dsmoe.routing import AllExperts, SelectionPlan, Threshold, TopK, routed_layers
from lightning_dsmoe.training.language_model import DSMoELanguageModel

pytestmark = pytest.mark.slow

TOP_1 = SelectionPlan(experts=TopK(1), attention=TopK(1))


def loss_of(model: DSMoELanguageModel, loader: Any, plan: SelectionPlan | None) -> float:
    """Mean loss of all tokens, one by one."""
    losses = []
    model.eval()
    with torch.no_grad():
        for batch in loader:
            for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                logits = model(tokens[None], plan).logits[0]
                losses += [
                    F.cross_entropy(row, label).item()
                    for row, label in zip(logits, labels, strict=True)
                    if label != -100
                ]
    return sum(losses) / len(losses)


def test_sharded_weights_are_refused_at_once(model: DSMoELanguageModel) -> None:
    trainer = mock.Mock(strategy=FSDPStrategy())
    callback = SparseEvaluation({"top_1": TOP_1})
    for hook in (callback.on_fit_start, callback.on_validation_start, callback.on_test_start):
        with pytest.raises(ValueError, match="which FSDPStrategy flattens"):
            hook(trainer, model)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_same_as_a_loop_over_tokens(
    stage: str,
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    loader = make_loader(3)
    plan = SelectionPlan.of_blocks((TopK(2), Threshold(0.5)), (TopK(1), AllExperts()))
    callback = SparseEvaluation({"mixed": plan, "top_1": TOP_1})
    trainer = make_trainer(callbacks=[callback])
    evaluate = trainer.validate if stage == "val" else trainer.test
    (logged,) = evaluate(model, loader, verbose=False)

    dense = loss_of(model, loader, None)
    top_1 = SelectionPlan(experts=TopK(1), attention=TopK(1))
    for name, used in (("mixed", plan), ("top_1", top_1)):
        result = callback.results[name]
        sparse = loss_of(model, loader, used)
        assert sparse != pytest.approx(dense, rel=1e-3)
        assert result.sparse_loss == pytest.approx(sparse, rel=1e-5)
        assert result.dense_loss == pytest.approx(dense, rel=1e-5)
        assert result.relative_gap == pytest.approx(sparse / dense - 1, rel=1e-3)
        assert logged[f"{stage}/sparse/{name}/loss"] == pytest.approx(result.sparse_loss)
        assert logged[f"{stage}/sparse/{name}/gap"] == pytest.approx(result.relative_gap)
        share = logged[f"{stage}/sparse/{name}/active_share"]
        assert share == pytest.approx(result.active_share_mean)
    assert logged[f"{stage}/loss"] == pytest.approx(result.dense_loss)

    counts = count_parameters(model)
    share = (counts.always + sum(e.per_expert for e in counts.layers.values())) / counts.hidden
    assert callback.results["top_1"].active_share_mean == pytest.approx(share)
    assert callback.results["top_1"].active_share_p95 == pytest.approx(share, abs=5e-4)
    shares: list[float] = []
    selections = plan.selections(routed_layers(model))
    for batch in loader:
        with torch.no_grad():
            routings = model(batch["input_ids"], plan).routings.by_name()
        active = torch.full(batch["labels"].shape, float(counts.always))
        for name, layer in counts.layers.items():
            probs = routings[name.removeprefix("decoder.")].routing.probs
            active += layer.per_expert * selections[name].mask(probs).sum(-1)
        shares += (active / counts.hidden)[batch["labels"] != -100].tolist()
    mixed = callback.results["mixed"].active_share_mean
    assert mixed == pytest.approx(sum(shares) / len(shares), rel=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_all_experts_are_the_dense_model(
    precision: str,
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    callback = SparseEvaluation({"all": SelectionPlan()})
    make_trainer(callbacks=[callback], precision=precision).validate(
        model, make_loader(2), verbose=False
    )
    result = callback.results["all"]
    assert abs(result.relative_gap) < 1e-6
    assert (result.active_share_mean, result.active_share_p50) == (1, 1)


def test_a_model_without_routers_is_refused(
    make_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    model = make_model(
        attention=partial(GroupedQueryAttention, n_heads=2, n_kv_heads=1, d_head=4),
        feed_forward=partial(FeedForward, d_hidden=12),
    )
    trainer = make_trainer(callbacks=[SparseEvaluation({"top_1": TOP_1})])
    with pytest.raises(ValueError, match=r"^SparseEvaluation, 'top_1' needs .* routed layers"):
        trainer.validate(model, make_loader(2), verbose=False)


def test_plan_that_does_not_fit_stops_before_the_first_step(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    class NoStep(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise AssertionError("a step was taken")

        def on_validation_batch_start(self, *args: Any) -> None:
            raise AssertionError("a batch was evaluated")

    callback = SparseEvaluation({"fits": TOP_1, "five": SelectionPlan(experts=TopK(5))})
    trainer = make_trainer(max_steps=1, callbacks=[callback, NoStep()])
    with pytest.raises(ValueError, match=r"'five': plan, experts, \S*: TopK\(k=5\).*<= 4"):
        trainer.fit(model, make_loader(1), make_loader(1))


def test_saved_plan(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    path = tmp_path / "plan.json"
    SelectionPlan(experts=TopK(1), attention=TopK(1)).save(path)
    callback = SparseEvaluation({"saved": str(path), "made": TOP_1})
    make_trainer(callbacks=[callback]).validate(model, make_loader(2), verbose=False)
    assert callback.results["saved"] == callback.results["made"]


def test_impossible_plans(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one plan"):
        SparseEvaluation({})
    with pytest.raises(ValueError, match=r"'lost'.*absent\.json"):
        SparseEvaluation({"lost": str(tmp_path / "absent.json")})
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"'bad'.*broken\.json: the plan must be"):
        SparseEvaluation({"bad": str(tmp_path / "broken.json")})


@pytest.mark.parametrize("name", [False, 1, 1.5, None])
def test_names_that_yaml_takes_for_something_else(name: Any) -> None:
    with pytest.raises(ValueError, match=f"must be a string, got {name}: write it in quotes"):
        SparseEvaluation({"fits": TOP_1, name: TOP_1})


@pytest.mark.parametrize("name", ["", "top/1", "top 1", "top:1", "{top}", ".."])
def test_names_that_loggers_do_not_take(name: str) -> None:
    with pytest.raises(ValueError, match=rf"must begin with .*, got '{re.escape(name)}'"):
        SparseEvaluation({name: TOP_1})


def test_one_name_in_two_callbacks_is_refused(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    plans = {"top_1": TOP_1, "all": SelectionPlan()}
    trainer = make_trainer(callbacks=[SparseEvaluation(plans), SparseEvaluation({"top_1": TOP_1})])
    with pytest.raises(ValueError, match=r"more than one .* a plan named top_1, and"):
        trainer.validate(model, make_loader(1), verbose=False)


def test_fit_evaluates_at_each_validation_and_not_in_the_sanity_check(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    seen = []
    callback = SparseEvaluation({"top_1": TOP_1})

    class Watch(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            seen.append(callback.results.get("top_1"))

    trainer = make_trainer(max_steps=4, val_check_interval=2, callbacks=[callback, Watch()])
    trainer.fit(model, make_loader(4), make_loader(2))
    sanity, first, second = seen
    assert sanity is None
    assert first != second
    assert trainer.callback_metrics["val/sparse/top_1/loss"].item() == pytest.approx(
        second.sparse_loss
    )


def test_nan_is_not_hidden(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    model.configure_model()
    torch.nn.init.constant_(model.decoder.norm.weight, float("nan"))
    callback = SparseEvaluation({"top_1": TOP_1})
    make_trainer(callbacks=[callback], fast_dev_run=True).validate(
        model, make_loader(1), verbose=False
    )
    assert callback.results["top_1"].sparse_loss != callback.results["top_1"].sparse_loss


def test_names_of_version_0_1() -> None:
    result: Any = SparseResult(1.5, 1.0, 0.5, 0.3, 0.2, 0.4)
    for old, value in (("loss", 1.5), ("gap", 0.5), ("active_share", 0.3)):
        with pytest.warns(DeprecationWarning, match=f"SparseResult.{old} is now "):
            assert getattr(result, old) == value

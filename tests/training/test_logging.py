"""What is logged, and when; and what is said of a loss that is not finite."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.callbacks import SparseFinishing
from lightning_dsmoe.losses import consistency_loss, entropy, mutual_information_loss
from lightning_dsmoe.routing import SelectionPlan, TopK
from lightning_dsmoe.training.language_model import DSMoELanguageModel

pytestmark = pytest.mark.slow

MakeModel = Callable[..., DSMoELanguageModel]
TERMS = [
    f"{kind}/{term}"
    for kind in ("experts", "attention")
    for term in ("mutual_information", "entropy", "balance_entropy")
]


def rows(trainer: Trainer, column: str) -> dict[int, dict[str, str]]:
    """What was logged together with a column, by step."""
    with (Path(str(trainer.log_dir)) / "metrics.csv").open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file) if row[column]}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_routing_terms_are_in_every_row_that_loggers_write(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    outputs: Any,
    accumulate: int,
) -> None:
    trainer = make_trainer(
        max_steps=7,
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        callbacks=[outputs],
    )
    trainer.fit(make_one_model(), make_loader(), make_loader(3))
    logged = rows(trainer, "train/loss")
    assert list(logged) == [2, 5]
    for step, row in logged.items():
        output = outputs.outputs[accumulate * (step + 1) - 1]
        for kind, routings in zip(("experts", "attention"), output["routings"], strict=True):
            assert len(routings) == 2
            mask = output["mask"]
            information = sum(-mutual_information_loss(r.probs, mask) for r in routings) / 2
            sharpness = sum(entropy(r.probs)[mask].mean() for r in routings) / 2
            balance = sum(entropy(r.probs[mask].mean(0)) for r in routings) / 2
            for term, expected in (
                ("mutual_information", information),
                ("entropy", sharpness),
                ("balance_entropy", balance),
            ):
                found = float(row[f"train/{kind}/{term}"])
                assert found == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended:UserWarning")
def test_routing_terms_are_in_the_rows_of_a_resumed_run(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    class SaveAfterFour(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    first = make_trainer(max_steps=5, callbacks=[SaveAfterFour()])
    first.fit(make_one_model(), make_loader(15), make_loader(3))
    second = make_trainer(max_steps=9, log_every_n_steps=3)
    second.fit(
        make_one_model(),
        make_loader(15),
        make_loader(3),
        ckpt_path=tmp_path / "four.ckpt",
        weights_only=True,
    )
    logged = rows(second, "train/loss")
    assert list(logged) == [5, 8]
    assert all(row[f"train/{term}"] for row in logged.values() for term in TERMS)


def test_nothing_is_logged_where_logging_is_off(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer(max_steps=3, log_every_n_steps=0)
    trainer.fit(make_one_model(), make_loader(), make_loader(3))
    assert "train/loss" in trainer.callback_metrics
    assert not any(f"train/{term}" in trainer.callback_metrics for term in TERMS)


def test_consistency_is_logged_where_a_plan_is_trained(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    plan = SelectionPlan(experts=TopK(1))
    expected: list[tuple[float, float]] = []

    class Compare(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            dense, sparse = (pl_module(batch["input_ids"], p).logits for p in (None, plan))
            loss = F.cross_entropy(dense.flatten(0, 1), batch["labels"].flatten())
            expected.append((loss.item(), consistency_loss(dense, sparse).item()))

    finishing = SparseFinishing(SelectionPlan(experts=TopK(1)), steps=2)
    trainer = make_trainer(max_steps=4, log_every_n_steps=1, callbacks=[Compare(), finishing])
    trainer.fit(make_one_model(consistency_weight=2.0), make_loader(), make_loader(3))
    logged = rows(trainer, "train/consistency")
    assert list(logged) == [2, 3]
    for step, row in logged.items():
        found = float(row["train/all_experts/loss"]), float(row["train/consistency"])
        assert found == pytest.approx(expected[step], rel=1e-4)
        assert row["train/loss"] != row["train/all_experts/loss"]


class WithSizes(LightningDataModule):
    """One loader for every split, with texts of different density."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader

    def bytes_per_token(self, split: str) -> float:
        return {"val": 2.5, "test": 4.0}[split]

    def chars_per_token(self, split: str) -> float:
        return {"val": 2.0, "test": 3.0}[split]

    def val_dataloader(self) -> Any:
        return self.loader

    def test_dataloader(self) -> Any:
        return self.loader


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_counts_every_token_once(
    make_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    split: str,
) -> None:
    model = make_model().eval()
    loader = make_loader(8, ignored=7)
    trainer = make_trainer()
    data = WithSizes(loader)
    evaluate = trainer.validate if split == "val" else trainer.test
    [found] = evaluate(model, data, verbose=False)
    windows = loader.dataset
    tokens = torch.stack([window["input_ids"] for window in windows])
    labels = torch.stack([window["labels"] for window in windows])
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()).item()
    assert found[f"{split}/loss"] == pytest.approx(loss, rel=1e-5)
    assert found[f"{split}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    bits = loss / math.log(2)
    per_byte, per_char = data.bytes_per_token(split), data.chars_per_token(split)
    assert found[f"{split}/bits_per_byte"] == pytest.approx(bits / per_byte, rel=1e-5)
    assert found[f"{split}/bits_per_char"] == pytest.approx(bits / per_char, rel=1e-5)
    assert all(math.isfinite(found[f"{split}/{term}"]) for term in TERMS)


def test_evaluations_do_not_add_up(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    model, loader = make_one_model(), make_loader(6, ignored=7)
    trainer = make_trainer(max_steps=2, limit_val_batches=1)
    [before] = trainer.validate(model, loader, verbose=False)
    trainer.fit(model, loader, loader)  # after an evaluation in inference mode
    during = trainer.callback_metrics["val/loss"].item()
    [after] = trainer.validate(model, loader, verbose=False)
    assert after["val/loss"] < before["val/loss"]
    assert during == pytest.approx(after["val/loss"], rel=1e-6)


def test_means_are_in_full_precision_where_training_is_not(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bfloat16 a count of tokens stops growing at 256 times what is added."""
    model, loader = make_one_model(), make_loader(300)
    evaluate, losses = type(model).validation_step, []

    def recorded(self: Any, *args: Any) -> Any:
        found = evaluate(self, *args)
        losses.append(found["loss"].float())
        return found

    monkeypatch.setattr(type(model), "validation_step", recorded)
    trainer = make_trainer(precision="bf16-true", max_steps=1)
    trainer.fit(model, loader, loader)
    for _ in range(2):
        losses.clear()
        [found] = trainer.validate(model, loader, verbose=False)
        assert model.val_loss.mean_value.dtype == torch.float32
        assert found["val/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_batch_that_is_not_finite_is_not_left_out_of_the_mean(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    model = make_one_model(tie_embeddings=False)
    windows = make_loader(12)
    used = {token for window in windows.dataset for token in window["input_ids"].tolist()}
    unused = min(set(range(97)) - used)
    with torch.no_grad():
        model.decoder.embedding.weight[unused] = math.nan
    [before] = make_trainer().validate(model, windows, verbose=False)
    windows.dataset[-1]["input_ids"] = torch.full((16,), unused)
    [after] = make_trainer().validate(model, windows, verbose=False)
    assert math.isfinite(before["val/loss"])
    assert math.isnan(after["val/loss"])


class Poison(Callback):
    """Makes the head overflow before a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.kept: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            with torch.no_grad():
                pl_module.get_parameter("decoder.head.weight").fill_(math.inf)
            self.kept = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


@pytest.mark.parametrize("every", [2, 3], ids=["logged step", "unlogged step"])
def test_a_loss_that_is_not_finite_stops_before_the_step(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    every: int,
) -> None:
    poison = Poison(3)
    model = make_one_model(tie_embeddings=False)
    trainer = make_trainer(max_steps=6, log_every_n_steps=every, callbacks=[poison])
    numbers = ", ".join(rf"{term} \d\.\d+" for term in TERMS)
    message = rf"the loss is nan at step 3, batch 3 \(language model nan, {numbers}\); no step was"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(model, make_loader(18), make_loader(3))
    assert trainer.global_step == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, poison.kept[name]), name


def test_each_router_is_logged_where_asked(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer(max_steps=4, log_every_n_steps=2)
    trainer.fit(make_one_model(log_layers=True), make_loader(), make_loader(3))
    kinds = ("experts", "attention")
    names = {f"train/{kind}/layer_0{layer}" for kind in kinds for layer in (0, 1)}
    for row in rows(trainer, "train/loss").values():
        found = {name: row[f"{name}/mutual_information"] for name in names}
        for kind in kinds:
            values = [float(value) for name, value in found.items() if kind in name]
            mean = float(row[f"train/{kind}/mutual_information"])
            assert sum(values) / 2 == pytest.approx(mean, rel=1e-5)

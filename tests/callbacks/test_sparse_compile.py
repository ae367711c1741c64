import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch.nn import functional as F

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.certificate.check import differences
from lightning_dsmoe.analysis.certificate.judgement import judge
from lightning_dsmoe.analysis.certificate.reading import read_certificate
from lightning_dsmoe.analysis.certificate.record import TextSource
from lightning_dsmoe.analysis.certificate.record import certificate as made
from lightning_dsmoe.callbacks import (
    ExpertUtilizationMonitor,
    SparseCompile,
    SparseEvaluation,
)
from lightning_dsmoe.inference import load_sparse
from lightning_dsmoe.inference.artifact.certificate import load_certificate
from lightning_dsmoe.inference.artifact.hashes import certified_hashes
from lightning_dsmoe.routing import AllExperts, SelectionPlan, Threshold, TopK
from lightning_dsmoe.training.language_model import DSMoELanguageModel

pytestmark = pytest.mark.slow

PLAN = SelectionPlan.of_blocks((TopK(2), Threshold(0.5)), (TopK(1), AllExperts()))


def certificate(artifact: Path) -> dict[str, float]:
    read: dict[str, float] = json.loads((artifact / "certificate.json").read_text())
    return read


def test_certificate_agrees_with_sparse_evaluation(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    evaluation = SparseEvaluation({"same": PLAN})
    compiling = SparseCompile(PLAN)
    trainer = make_trainer(max_steps=2, val_check_interval=2, callbacks=[evaluation, compiling])
    trainer.fit(model, make_loader(2), [make_loader(3, seed=1)])
    assert compiling.artifact == Path(str(trainer.log_dir)) / "sparse"
    measured, expected = certificate(compiling.artifact), evaluation.results["same"]
    assert measured["sparse_loss"] == pytest.approx(expected.sparse_loss, rel=1e-5)
    assert measured["dense_loss"] == pytest.approx(expected.dense_loss, rel=1e-5)
    assert measured["relative_gap"] == pytest.approx(expected.relative_gap, rel=1e-3)
    assert measured["active_share_mean"] == pytest.approx(expected.active_share_mean)
    assert measured["active_share_p50"] == pytest.approx(expected.active_share_p50)
    assert measured["active_share_p95"] == pytest.approx(expected.active_share_p95)
    assert measured["tokens"] == 8 * 6 - 4  # the last window ends in padding


def test_certificate_is_a_full_one(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    compiling = SparseCompile(PLAN, path=str(tmp_path / "here"), max_batches=2)
    trainer = make_trainer(max_steps=1, callbacks=[compiling])
    trainer.fit(model, make_loader(2), make_loader(3, seed=1))
    measured = read_certificate("it", load_certificate(tmp_path / "here"))
    assert measured is not None
    assert measured["sha256"] == certified_hashes(tmp_path / "here")
    batches = [(b["input_ids"], b["labels"]) for b in make_loader(3, seed=1)][:2]
    assert measured["data"] == {
        "source": "other",
        "split": "val",
        "val_fraction": None,
        "test_fraction": None,
        "context": 6,
        "batch_tokens": 18,
        "fingerprint": HeldOut(batches, 36).fingerprint(),
    }
    assert measured["dense"] == "checkpoint"
    assert measured["all_experts_error"] < 1e-5
    assert measured["checkpoint_sha256"] is None
    text = HeldOut(batches, 36)
    again = judge(load_sparse(tmp_path / "here"), text)
    found = differences(measured, made(again, text, TextSource("other", "val")))
    assert found == []


def test_a_loss_that_is_no_number_writes_nothing(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    class Breaks(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with torch.no_grad():
                pl_module.decoder.norm.weight.fill_(float("nan"))

    compiling = SparseCompile(PLAN, path=str(tmp_path / "here"))
    trainer = make_trainer(max_steps=1, callbacks=[Breaks(), compiling])
    with pytest.raises(FloatingPointError, match="nan; no sparse model was written"):
        trainer.fit(model, make_loader(1), make_loader(1))
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_artifact_is_the_trained_model_under_the_plan(
    quantization: Any,
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    compiling = SparseCompile(PLAN, quantization=quantization, path=str(tmp_path / "here"))
    trainer = make_trainer(max_steps=2, callbacks=[compiling])
    trainer.fit(model, make_loader(2), make_loader(2, seed=1))
    assert compiling.artifact == tmp_path / "here"
    loaded = load_sparse(compiling.artifact)
    assert loaded.plan == PLAN
    assert bool(loaded.report().quantized) == (quantization == "int8")

    batches = list(make_loader(2, seed=1))
    losses, exact_losses, agreed = [], [], []
    model.eval()
    for batch in batches:
        tokens, labels = batch["input_ids"], batch["labels"]
        logits = loaded.logits(tokens)
        with torch.no_grad():
            dense = model(tokens).logits
            if quantization is None:
                torch.testing.assert_close(logits, model(tokens, PLAN).logits)
            else:
                assert not torch.equal(logits, model(tokens, PLAN).logits)
                torch.testing.assert_close(logits, model(tokens, PLAN).logits, rtol=0.05, atol=0.05)
        counted = labels != -100
        chances = logits.log_softmax(-1)[counted]
        losses.append(-chances.gather(-1, labels[counted][:, None]).flatten())
        with torch.no_grad():
            exact = model(tokens, PLAN).logits[counted]
        exact_losses.append(F.cross_entropy(exact, labels[counted], reduction="none"))
        agreed.append((logits.argmax(-1) == dense.argmax(-1))[counted])
    measured = certificate(compiling.artifact)
    assert measured["sparse_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    share = torch.cat(agreed).double().mean().item()
    assert measured["top_1_agreement"] == pytest.approx(share)
    assert (measured["routing_agreement"] is not None) == (quantization == "int8")
    assert (measured["loss_before_quantization"] is not None) == (quantization == "int8")
    if quantization == "int8":
        before = torch.cat(exact_losses).mean().item()
        assert measured["loss_before_quantization"] == pytest.approx(before, rel=1e-5)
        assert measured["sparse_loss"] != pytest.approx(before, rel=1e-6)
        assert 0.9 < measured["routing_agreement"] <= 1


def test_plan_that_does_not_fit_stops_before_the_first_step(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    class NoStep(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise AssertionError("a step was taken")

    compiling = SparseCompile(SelectionPlan(experts=TopK(5)), path=str(tmp_path / "here"))
    trainer = make_trainer(max_steps=1, callbacks=[compiling, NoStep()])
    with pytest.raises(ValueError, match=r"SparseCompile: plan, experts, \S*: TopK\(k=5\)"):
        trainer.fit(model, make_loader(1), make_loader(1))
    assert not (tmp_path / "here").exists()


def test_nothing_is_written_where_nothing_is_logged(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    compiling = SparseCompile(PLAN)
    make_trainer(fast_dev_run=True, callbacks=[compiling]).fit(
        model, make_loader(1), make_loader(1)
    )
    assert compiling.artifact is None
    assert list(tmp_path.iterdir()) == []


def test_a_trial_run_replaces_no_artifact(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    compiling = SparseCompile(PLAN, path=str(tmp_path / "here"))
    make_trainer(fast_dev_run=True, callbacks=[compiling]).fit(
        model, make_loader(1), make_loader(1)
    )
    assert compiling.artifact is None
    assert not (tmp_path / "here").exists()


def test_only_an_earlier_artifact_is_replaced(
    make_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    place = tmp_path / "here"

    def fit(steps: int) -> dict[str, float]:
        compiling = SparseCompile(PLAN, path=str(place))
        trainer = make_trainer(max_steps=steps, callbacks=[compiling])
        trainer.fit(make_model(), make_loader(4), make_loader(1))
        return certificate(place)

    assert fit(1) != fit(4)
    assert load_sparse(place).plan == PLAN
    assert [path.name for path in tmp_path.glob("*here*")] == ["here"]

    (place / "SHA256SUMS").unlink()
    (place / "thesis.txt").write_text("years of work")
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(FileExistsError, match="here exists and is not a sparse model"):
        fit(1)
    assert sorted(path.name for path in place.iterdir()) == before
    assert (place / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("logger", [False, "remote"])
def test_runs_without_a_log_directory_keep_each_their_own(
    logger: Any,
    make_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    make_remote: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    artifacts = []
    for plan in (PLAN, SelectionPlan()):
        compiling = SparseCompile(plan, max_batches=0)
        used = make_remote(tmp_path) if logger else False
        callbacks = [ExpertUtilizationMonitor(), compiling]
        options = {"logger": used, "default_root_dir": tmp_path, "callbacks": callbacks}
        make_trainer(max_steps=1, **options).fit(make_model(), make_loader(1), make_loader(1))
        assert compiling.artifact is not None
        artifacts.append(compiling.artifact)
    assert [load_sparse(path).plan for path in artifacts] == [PLAN, SelectionPlan()]
    assert all((path.parent / "utilization" / "last.png").exists() for path in artifacts)


def test_a_run_that_would_replace_an_earlier_one_is_refused(
    make_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    make_remote: Callable[..., Any],
    tmp_path: Path,
) -> None:
    def fit(trainer: Trainer) -> None:
        trainer.fit(make_model(), make_loader(2), make_loader(1))

    def trainer(**options: Any) -> Trainer:
        compiling = SparseCompile(PLAN, max_batches=0, **options)
        same = make_remote(tmp_path, version="same")
        return make_trainer(max_epochs=1, max_steps=-1, logger=same, callbacks=[compiling])

    first = trainer()
    fit(first)
    with pytest.raises(FileExistsError, match="sparse is the sparse model of an earlier run"):
        fit(trainer())
    fit(trainer(name="again"))
    assert first.fit_loop.max_epochs == 1
    first.fit_loop.max_epochs = 2
    fit(first)  # the same run goes on
    assert {path.name for path in (tmp_path / "project" / "same").iterdir()} == {"sparse", "again"}


def test_two_at_once(
    make_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    dense = SelectionPlan()

    def fit(*callbacks: SparseCompile) -> None:
        trainer = make_trainer(max_steps=1, callbacks=list(callbacks))
        trainer.fit(make_model(), make_loader(1), make_loader(1))

    first = SparseCompile(PLAN, max_batches=0)
    second = SparseCompile(dense, name="dense", max_batches=0)
    fit(first, second)
    assert first.artifact is not None
    assert second.artifact == first.artifact.with_name("dense")
    assert [load_sparse(c.artifact).plan for c in (first, second)] == [PLAN, dense]
    for options in ({}, {"path": str(tmp_path / "here")}):
        with pytest.raises(ValueError, match=r"more than one SparseCompile writes to .*give each"):
            fit(SparseCompile(PLAN, **options), SparseCompile(dense, **options))
    assert not (tmp_path / "here").exists()


def test_without_measuring(
    model: DSMoELanguageModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    compiling = SparseCompile(PLAN, max_batches=0)
    make_trainer(max_steps=1, callbacks=[compiling]).fit(model, make_loader(1), make_loader(1))
    assert compiling.artifact is not None
    assert load_sparse(compiling.artifact).plan == PLAN
    assert not (compiling.artifact / "certificate.json").exists()


def test_impossible_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SparseCompile: .*absent\.json"):
        SparseCompile(str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match="max_batches must be 0 or more, got -1"):
        SparseCompile(PLAN, max_batches=-1)
    with pytest.raises(ValueError, match=r"name of an artifact must begin .*, got '\.\./x'"):
        SparseCompile(PLAN, name="../x")


def test_the_old_name_of_tuning_is_read_and_set_too() -> None:
    with pytest.warns(DeprecationWarning, match=r"SparseCompile\(calibrate=\) is now tune="):
        compiling = SparseCompile(PLAN, calibrate=True)
    with pytest.warns(DeprecationWarning, match=r"SparseCompile\.calibrate is now tune"):
        assert compiling.calibrate  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning, match=r"SparseCompile\.calibrate is now tune"):
        compiling.calibrate = False  # type: ignore[attr-defined]
    assert not compiling.tune

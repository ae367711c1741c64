"""How sparse a trained model can run."""

import csv
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.commands.trained import text_for, tokenizer_of
from lightning_dsmoe.inference import load_decoder
from lightning_dsmoe.routing import SelectionPlan

from .conftest import Outcome, Run

sweep_module = import_module("lightning_dsmoe.commands.sweep")
trained_module = import_module("lightning_dsmoe.commands.trained")


@pytest.fixture
def words(measuring: Callable[[str, str], list[str]]) -> list[str]:
    return measuring("sweep", "sweep")


def test_it_writes_tables_plans_and_pictures(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "sweep"
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 20
    assert list(rows[0]) == [
        "plan",
        "loss",
        "share",
        "share_p50",
        "share_p95",
        "tokens_per_second",
        "on_frontier",
    ]
    assert rows[0]["plan"] == "all"
    assert float(rows[0]["share"]) == 1
    assert {row["on_frontier"] for row in rows} == {"True", "False"}
    kept = json.loads((folder / "sweep.json").read_text())["plans"]
    assert list(kept) == [row["plan"] for row in rows]
    for row in rows:
        assert float(row["loss"]) == kept[row["plan"]]["result"]["loss"]
        assert 0 < float(row["share_p50"]) <= float(row["share_p95"]) <= 1
        SelectionPlan.from_dict(kept[row["plan"]]["plan"])
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (folder / "frontier.svg").read_text()
    assert "The knee is " in outcome.out
    SelectionPlan.load(folder / "knee.json")


def test_it_goes_on_where_it_was_stopped(
    cli: Callable[..., Outcome],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate, tried = sweep_module.evaluate_plan, []

    def interrupted(model: Any, plan: SelectionPlan, *rest: Any) -> Any:
        if len(tried) == 3:
            raise RuntimeError("power failure")
        tried.append(plan)
        return evaluate(model, plan, *rest)

    monkeypatch.setattr(sweep_module, "evaluate_plan", interrupted)
    assert cli(*words).errors == ["lightning-dsmoe: error: power failure"]
    first = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["plans"]
    assert len(first) == 3

    def counted(model: Any, plan: SelectionPlan, *rest: Any) -> Any:
        tried.append(plan)
        return evaluate(model, plan, *rest)

    monkeypatch.setattr(sweep_module, "evaluate_plan", counted)
    assert cli(*words).code == 0
    whole = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["plans"]
    assert len(tried) == len(whole)
    assert {name: whole[name] for name in first} == first


def test_results_of_something_else_are_not_mixed(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    assert cli(*words).code == 0
    before = (tmp_path / "sweep" / "sweep.json").read_text()
    outcome = cli(*words, "--max_tokens=200")
    assert outcome.code == 1
    [error] = outcome.errors
    assert "is of another model, text or device; choose another output" in error
    assert (tmp_path / "sweep" / "sweep.json").read_text() == before
    (tmp_path / "sweep" / "sweep.json").write_text("[1]")
    [error] = cli(*words).errors
    assert "sweep.json is not a sweep; choose another output" in error


def test_text_that_is_too_short(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("def f(x): return x\n" * 3)
    outcome = cli(*words, f"--files={tmp_path / 'short.txt'}")
    assert outcome.code == 1
    [error] = outcome.errors
    assert "needs at least 17: use more text" in error
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(("vocab_size", "expected"), [(65, 8192), (2**15, 2048)])
def test_batches_are_smaller_for_a_large_vocabulary(
    vocab_size: int, expected: int, trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_decoder(trained.checkpoint)
    asked: list[int] = []
    monkeypatch.setattr(type(tokenizer_of(loaded)), "vocab_size", vocab_size)
    monkeypatch.setattr(
        trained_module, "held_out", lambda *_, batch_tokens, **__: asked.append(batch_tokens)
    )
    text_for(loaded)
    assert asked == [expected]

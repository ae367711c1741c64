"""How sparse a trained model can run."""

import csv
import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.commands.evaluation_setup import text_for
from lightning_dsmoe.inference import load_decoder
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.routing.plan import describe

from .conftest import Outcome, Run, words_of

pytestmark = pytest.mark.slow

sweep_module = import_module("lightning_dsmoe.commands.sweep")
trained_module = import_module("lightning_dsmoe.commands.evaluation_setup")


@pytest.fixture
def words(measuring: Callable[[str, str], list[str]]) -> list[str]:
    return measuring("sweep", "sweep")


@pytest.fixture(scope="module")
def finished(
    trained: Run, cli: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of a whole sweep, and what the command printed."""
    folder = tmp_path_factory.mktemp("finished") / "sweep"
    outcome = cli(*words_of(trained, "sweep", folder))
    assert outcome.code == 0, outcome.err
    return folder, outcome.out


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """The whole sweep where `words` write theirs."""
    return Path(shutil.copytree(finished[0], tmp_path / "sweep"))


def test_it_writes_tables_plans_and_pictures(finished: tuple[Path, str]) -> None:
    folder, out = finished
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
        result = kept[row["plan"]]["result"]
        assert list(result) == ["loss", "share", "share_p50", "share_p95", "tokens_per_second"]
        assert float(row["loss"]) == result["loss"]
        assert 0 < float(row["share_p50"]) <= float(row["share_p95"]) <= 1
        SelectionPlan.from_dict(kept[row["plan"]]["plan"])
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (folder / "frontier.svg").read_text()
    plan = SelectionPlan.load(folder / "knee.json")
    [name] = [name for name, row in kept.items() if row["plan"] == plan.to_dict()]
    assert f"The knee is {name} ({describe(plan)}), in " in out
    for words_of_table in ("vs all", " %", "tokens/s", "loss: nats per token"):
        assert words_of_table in out


def test_a_stopped_sweep_resumes(
    cli: Callable[..., Outcome],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate, propose, tried = sweep_module.evaluate_plan, sweep_module.sweep_plans, []
    monkeypatch.setattr(
        sweep_module, "sweep_plans", lambda decoder: dict(list(propose(decoder).items())[:6])
    )

    def interrupted(model: Any, plan: SelectionPlan, *rest: Any) -> Any:
        if len(tried) == 3:
            raise RuntimeError("power failure")
        tried.append(plan)
        return evaluate(model, plan, *rest)

    monkeypatch.setattr(sweep_module, "evaluate_plan", interrupted)
    [error] = cli(*words).errors
    assert "power failure" in error
    first = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["plans"]
    assert len(first) == 3

    def counted(model: Any, plan: SelectionPlan, *rest: Any) -> Any:
        tried.append(plan)
        return evaluate(model, plan, *rest)

    monkeypatch.setattr(sweep_module, "evaluate_plan", counted)
    assert cli(*words).code == 0
    whole = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["plans"]
    assert len(tried) == len(whole) == 6
    assert {name: whole[name] for name in first} == first


def test_results_of_something_else_are_not_mixed(
    cli: Callable[..., Outcome], words: list[str], copied: Path
) -> None:
    before = (copied / "sweep.json").read_text()
    outcome = cli(*words, "--max_tokens=200")
    assert outcome.code == 1
    [error] = outcome.errors
    assert "is of another model, text, device or version; choose another output" in error
    assert (copied / "sweep.json").read_text() == before
    [error] = cli(*words, "--context=8").errors
    assert "is of another model, text, device or version" in error
    kept = json.loads(before)
    kept["plans"]["top 2 and 2"]["plan"] = kept["plans"]["top 1 and 1"]["plan"]
    (copied / "sweep.json").write_text(json.dumps(kept))
    [error] = cli(*words).errors
    assert "is of another model, text, device or version" in error


def change_plans(kept: Any) -> Any:
    kept["plans"] = []
    return kept


def remove_plans(kept: Any) -> Any:
    del kept["plans"]
    return kept


def word_for_a_loss(kept: Any) -> Any:
    kept["plans"]["all"]["result"]["loss"] = "a"
    return kept


def loss_of_nan(kept: Any) -> Any:
    kept["plans"]["all"]["result"]["loss"] = float("nan")
    return kept


def remove_share(kept: Any) -> Any:
    del kept["plans"]["all"]["result"]["share"]
    return kept


@pytest.mark.parametrize(
    "change",
    [
        change_plans,
        remove_plans,
        word_for_a_loss,
        loss_of_nan,
        remove_share,
        lambda kept: [1],
        None,
    ],
)
def test_a_file_that_is_no_sweep(
    change: Callable[[Any], Any] | None,
    cli: Callable[..., Outcome],
    words: list[str],
    copied: Path,
) -> None:
    path = copied / "sweep.json"
    kept = json.loads(path.read_text())
    path.write_text("{" if change is None else json.dumps(change(kept)))
    [error] = cli(*words).errors
    assert "sweep.json is not a sweep; choose another output" in error


def test_a_file_in_place_of_the_folder(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "sweep").write_text("mine")
    [error] = cli(*words).errors
    assert "output must be a folder" in error
    assert (tmp_path / "sweep").read_text() == "mine"


def test_text_that_is_too_short(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("def f(x): return x\n" * 3)
    outcome = cli(*words, f"--files={tmp_path / 'short.txt'}")
    assert outcome.code == 1
    [error] = outcome.errors
    assert "needs at least 17: use more text" in error
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(("vocab_size", "expected"), [(256, 8192), (2**15, 2048)])
def test_batches_are_smaller_for_a_large_vocabulary(
    vocab_size: int, expected: int, trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_decoder(trained.checkpoint)
    asked: list[int] = []
    loaded.decoder.vocab_size = vocab_size
    monkeypatch.setattr(
        trained_module, "held_out", lambda *_, batch_tokens, **__: asked.append(batch_tokens)
    )
    text_for(loaded)
    assert asked == [expected]


def test_the_text_is_split_as_in_training(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_decoder(trained.checkpoint)
    asked: list[tuple[float, float]] = []
    monkeypatch.setattr(
        trained_module,
        "held_out",
        lambda *_, val_fraction, test_fraction, **__: asked.append((val_fraction, test_fraction)),
    )
    text_for(loaded)
    text_for(loaded, val_fraction=0.2, test_fraction=0.0)
    text_for(loaded._replace(val_fraction=None, test_fraction=None))
    assert asked == [(0.05, 0.05), (0.2, 0.0), (0.1, 0.0)]


def test_what_does_not_fit_into_memory_or_the_model(trained: Run) -> None:
    loaded = load_decoder(trained.checkpoint)
    with pytest.raises(ValueError, match="a context of 4194305 tokens with a vocabulary of 256"):
        text_for(loaded, context=2**22 + 1)
    loaded.decoder.vocab_size = 255
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the model only 255"):
        text_for(loaded)

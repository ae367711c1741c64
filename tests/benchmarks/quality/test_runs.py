"""Training and measuring in the benchmark of the paper's claims."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lightning_dsmoe.analysis.plans.solvers import THRESHOLDS
from lightning_dsmoe.commands.evaluation_setup import open_trained

pytestmark = pytest.mark.slow


def tiny(models: ModuleType) -> Any:
    changes = {
        "model": {"d_model": 16, "n_layers": 2},
        "attention": {"n_experts": 2, "n_heads": 1, "d_head": 8},
        "feed_forward": {"n_experts": 6, "d_expert": 4},
        "data": {"context": 16, "batch_size": 4},
        "trainer": {"accelerator": "cpu"},
    }
    return models.Preset(2, None, changes)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text in a folder to run in, with a command line that `train` may change."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return text


@pytest.mark.parametrize("name", ["DENSE", "SAME_ACTIVE", "strong MI"])
def test_a_run_trains_and_measures(
    benchmark_modules: SimpleNamespace,
    models: ModuleType,
    name: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark_modules.runs, "BATCH_TOKENS", 256)
    model = models.DS_MOE.get(name) or getattr(models, name)
    configuration = models.configuration(model, tiny(models), seed=1, steps=2)
    settings = {"shares": [0.1, 0.75], "eps": 0.48, "configuration": configuration}
    run = benchmark_modules.runs.carry_out(settings, str(text), threads=1)
    assert json.loads(json.dumps(run))["settings"] == settings
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    first, *points = run["points"]
    assert (first["rule"], first["share"]) == ("all", 1.0)
    rules = {point["rule"] for point in points}
    of_mixtures = {"threshold", "top-k"}
    assert rules == {
        "DENSE": set(),
        "SAME_ACTIVE": {"as trained"} | of_mixtures,
    }.get(name, {"mixed"} | of_mixtures)
    for point in points:
        assert point["budget"] != 0.1  # less than one expert of each router
        assert point["share"] <= point["budget"] + 0.01
        assert math.isfinite(point["loss"])
    routed = {kind for kind, found in run["running"].items() if found}
    assert routed == {"DENSE": set(), "SAME_ACTIVE": {"experts"}}.get(
        name, {"experts", "attention"}
    )


@pytest.mark.parametrize(
    "callbacks",
    [
        ["MIWeightAnnealing"],
        ["SparsityTarget"],
        ["SparseFinishing"],
        ["MIWeightAnnealing", "SparseFinishing"],
    ],
    ids=str,
)
def test_other_ways_of_training(
    benchmark_modules: SimpleNamespace,
    models: ModuleType,
    callbacks: list[str],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {
        name: [c["class_path"].rpartition(".")[2] for c in models.further_callbacks(name, 2000)]
        for name in (*models.MODELS, *models.OTHER_WAYS)
    }
    assert not any(found[name] for name in models.MODELS)
    name = next(name for name in models.OTHER_WAYS if found[name] == callbacks)
    configuration = models.configuration(name, tiny(models), seed=1, steps=2)
    settings = {"shares": [], "eps": 0.48, "configuration": configuration}
    monkeypatch.setattr(benchmark_modules.runs, "BATCH_TOKENS", 256)
    kept = tmp_path / "kept" / "model.ckpt"
    run = benchmark_modules.runs.carry_out(settings, str(text), 1, str(kept))
    assert run["points"][0]["rule"] == "all"
    source = {"files": str(text), "val_fraction": 0.5}
    rows = benchmark_modules.calibration.compare(kept, [0.1, 0.6], THRESHOLDS, source, twin=kept)
    assert [row["budget"] for row in rows] == [0.6]  # less than one expert of each is left out
    assert rows[0]["uniform_share"] <= rows[0]["share"] + 1e-9
    assert rows[0]["gain"] == pytest.approx(1 - rows[0]["loss"] / rows[0]["uniform_loss"])
    assert rows[0]["dense_twin"] == rows[0]["all_experts"]
    with pytest.raises(ValueError, match="in other tokens or windows"):
        benchmark_modules.calibration.dense_loss(
            kept, {**source, "max_tokens": 100}, open_trained(str(kept), **source).text
        )
    last = benchmark_modules.calibration.table(rows).splitlines()[-1]
    assert "| 60% |" in last
    assert last.endswith(f"| {rows[0]['loss'] / rows[0]['all_experts'] - 1:+.2%} |")

"""The benchmark of a machine with a GPU, at toy sizes on the CPU."""

import gc
import json
import math
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import inference, quality, sides, training
from benchmarks.gpu import record as record_module
from benchmarks.gpu import tests as tests_module
from benchmarks.quality import models as models_module
from benchmarks.quality import runs as runs_module
from lightning_dsmoe import (
    Decoder,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    TopK,
)
from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.experts import FeedForward

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes seconds after thousands of other tests
    return SimpleNamespace(
        main=main,
        record=record_module,
        sides=sides,
        inference=inference,
        training=training,
        tests=tests_module,
        quality=quality,
        models=models_module,
        runs=runs_module,
    )


def make(attention: Any, feed_forward: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(32, 16, 2, attention=attention, feed_forward=feed_forward)


@pytest.fixture
def tiny(gpu: SimpleNamespace) -> Any:
    return gpu.sides.Models(
        "tiny",
        partial(
            make,
            partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8),
            partial(MixtureOfExperts, n_experts=4, d_expert=8),
        ),
        partial(
            make,
            partial(GroupedQueryAttention, n_heads=4, n_kv_heads=1, d_head=8),
            partial(FeedForward, d_hidden=32),
        ),
        {"P": SelectionPlan(experts=TopK(2), attention=TopK(1))},
    )


def recorded(
    gpu: SimpleNamespace, measurements: Any, folder: Path, until: float = math.inf
) -> dict[str, Any]:
    """Results as they stand in the file, whose table has as many rows."""
    record = gpu.record.Record(folder, "part", gpu.record.about(CPU))
    gpu.record.carry_out(measurements, record, until=until)
    return read(folder)


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "part.json").read_text())
    table = [line for line in (folder / "part.md").read_text().splitlines() if line[:1] == "|"]
    assert len(table) == (2 + len(found["rows"]) if found["rows"] else 0)
    assert found["machine"]["torch"] == torch.__version__
    return found


@pytest.mark.parametrize("words", [[], ["--part=decode"], ["--part=tests"]])
def test_without_a_gpu_it_ends_in_one_line(
    gpu: SimpleNamespace, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", f"--out={tmp_path / 'out'}", *words])
    with pytest.raises(SystemExit) as stop:
        gpu.main.main()
    assert str(stop.value.code).startswith("benchmarks.gpu: there is no CUDA GPU here")
    assert "\n" not in str(stop.value.code)
    assert not (tmp_path / "out").exists()


def test_parts_whose_packages_are_missing_are_named_and_the_others_run(
    gpu: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = []

    def run(command: list[str], *, check: bool) -> Any:
        started.append(command[-1])
        return SimpleNamespace(returncode=0)

    text = tmp_path / "text.txt"
    text.write_text("a text")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.main.subprocess, "run", run)
    lacking = "jsonargparse"
    monkeypatch.setattr(gpu.main, "find_spec", lambda n: None if n == lacking else find_spec(n))
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", f"--out={tmp_path}", f"--text={text}"])
    with pytest.raises(SystemExit) as stop:
        gpu.main.main()
    assert stop.value.code == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line == "benchmarks.gpu: packages are missing, left out: quality without jsonargparse"
    assert started == [f"--part={part}" for part in ("tests", "decode", "prefill", "training")]


@pytest.mark.usefixtures("nothing_compiles")
def test_plans_are_compared_with_the_twin(gpu: SimpleNamespace, tiny: Any, tmp_path: Path) -> None:
    sizes = {"shapes": lambda: [tiny], "batch_sizes": (1, 2), "rounds": 1}
    for part, more in (("decode", {}), ("prefill", {"lengths": (4,)})):
        todo = getattr(gpu.inference, part)(CPU, math.inf, **sizes, **more)
        found = recorded(gpu, todo, tmp_path / part)
        assert found["ended"] == "complete"
        assert len(found["rows"]) == 2 * 3
        twin, everything, plan = found["rows"][:3]
        assert [row["side"] for row in found["rows"][:3]] == ["dense twin", "all experts", "P"]
        assert twin["speed ratio"] == twin["bound"] == 1
        assert plan["active"] < everything["active"] == 1
        assert plan["bound"] > 1 > everything["bound"]
        assert min(row["ms"] for row in found["rows"]) > 0


def test_training_steps_are_compared_with_those_of_the_twin(
    gpu: SimpleNamespace, tiny: Any, tmp_path: Path
) -> None:
    todo = gpu.training.training(
        CPU, math.inf, shape=lambda: tiny, context=8, batch_sizes=(2, 1), rounds=1
    )
    found = recorded(gpu, todo[:1], tmp_path)
    assert [row["side"] for row in found["rows"]] == ["dense twin", "DS-MoE"]
    assert all(row["sequences"] == 2 and row["tokens/s"] > 0 for row in found["rows"])
    assert found["rows"][0]["MFU"] is None


def test_a_batch_that_does_not_fit_is_made_smaller(
    gpu: SimpleNamespace, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = gpu.training._side

    def fits_one(decoder: Decoder, shape: tuple[int, int], *, compiled: bool) -> Any:
        def too_large() -> float:
            raise torch.OutOfMemoryError("no room")

        made = side(decoder, shape, compiled=compiled)
        return made if shape[0] == 1 else made._replace(turn=too_large)

    monkeypatch.setattr(gpu.training, "_side", fits_one)
    todo = gpu.training.training(
        CPU, math.inf, shape=lambda: tiny, context=8, batch_sizes=(4, 2, 1), rounds=1
    )
    assert {row["sequences"] for row in recorded(gpu, todo[:1], tmp_path)["rows"]} == {1}


def test_the_1b_shape_is_that_of_its_configuration(gpu: SimpleNamespace) -> None:
    models = gpu.sides.models_1b()
    sparse, dense = (
        gpu.sides.made_on(torch.device("meta"), m) for m in (models.sparse, models.dense)
    )
    operations = gpu.training.operations_per_token
    parameters = sum(p.numel() for p in dense.parameters())
    attention = 3 * 2 * 2 * 24 * 32 * 64 * (2048 + 1) / 2
    assert operations(models.dense, 2048) == pytest.approx(6 * parameters + attention, rel=1e-9)
    assert gpu.inference.hidden_share(sparse, models.plans["paper"]) == pytest.approx(
        0.41, abs=0.01
    )


def test_what_was_measured_stays_if_a_part_is_cut_off(gpu: SimpleNamespace, tmp_path: Path) -> None:
    def cut_off() -> Any:
        raise KeyboardInterrupt

    measurement = gpu.record.Measurement
    todo = [
        measurement({"size": 1}, lambda: [{"ms": 1.5}]),
        measurement({"size": 2}, lambda: [{"ms": 1 / 0}]),
        measurement({"size": 3}, cut_off),
    ]
    with pytest.raises(KeyboardInterrupt):
        recorded(gpu, todo, tmp_path)
    found = read(tmp_path)
    failed = {"size": 2, "error": "ZeroDivisionError: division by zero"}
    assert found["rows"] == [{"size": 1, "ms": 1.5}, failed]
    assert found["ended"] == "not yet: under way, or cut off"


def test_nothing_new_begins_when_time_is_up(gpu: SimpleNamespace, tmp_path: Path) -> None:
    todo = [gpu.record.Measurement({"size": 1}, lambda: pytest.fail("was begun"))]
    found = recorded(gpu, todo, tmp_path, until=time.monotonic() - 1)
    assert found["ended"] == "time was up, not measured: size 1"


def test_files_of_tests_run_apart(gpu: SimpleNamespace, tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    head = "import pytest\n@pytest.mark.gpu\n"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs one\ntimeou = 3\n")
    (tests / "test_a.py").write_text(f"import not_there\n{head}def test_a(): pass\n")
    (tests / "test_b.py").write_text(
        f"{head}def test_b(): pass\n@pytest.mark.gpu\ndef test_c(): assert 1 == 2\n"
    )
    (tests / "test_c.py").write_text("# pytest.mark.gpu\ndef test_other(): assert False\n")
    todo = gpu.tests.files_one_by_one(
        tests, tmp_path / "tests.txt", time.monotonic() + 250, root=tmp_path
    )
    lacking, run = recorded(gpu, todo, tmp_path)["rows"]
    assert (lacking["file"], lacking["errors"]) == ("tests/test_a.py", 1)
    assert (run["passed"], run["failed"], run["errors"]) == (1, 1, 0)
    assert "test_c: assert 1 == 2" in run["error"]
    assert "not_there" in (tmp_path / "tests.txt").read_text()


@pytest.mark.parametrize("late", [False, True])
def test_quality_tells_of_a_run_under_way(
    gpu: SimpleNamespace, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    changes = {
        "model": {"d_model": 16, "n_layers": 1},
        "attention": {"n_experts": 6, "n_heads": 1, "d_head": 8},
        "feed_forward": {"n_experts": 4, "d_expert": 4},
        "data": {"context": 16, "batch_size": 4},
        "trainer": {"accelerator": "cpu"},
    }
    preset = gpu.models.Preset(4, 2, changes)
    monkeypatch.setitem(gpu.models.PRESETS, "tiny", preset)
    points = {"points": [{"rule": "all", "loss": 3.0}], "running": {}}
    monkeypatch.setattr(gpu.runs, "measure", lambda *arguments: points)
    until, runs = (0.0 if late else math.inf), tmp_path / "runs.json"
    record = gpu.record.Record(tmp_path, "part", gpu.record.about(CPU))
    todo = gpu.quality.quality(text, runs, until, record.add, seeds=(1,), preset="tiny", steps=4)
    gpu.record.carry_out(todo, record, until=math.inf)
    rules = [row.get("rule") for row in read(tmp_path)["rows"]]
    if late:
        assert rules == ["after step 2", None]
        assert read(tmp_path)["rows"][1]["error"] == "TimeIsUp: cut off after step 2"
        assert not runs.exists()
    else:
        assert rules == ["after step 2", "after step 4", "all", "trained and measured"]
        [kept] = json.loads(runs.read_text())
        assert gpu.quality.reproduce.find(kept["settings"], [kept]) == kept
        assert "benchmarks.gpu" not in runs.read_text()

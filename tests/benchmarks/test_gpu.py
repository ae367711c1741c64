"""The benchmark of a machine with a GPU, at toy sizes on the CPU."""

import gc
import json
import math
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import engines, inference, int8, paper, quality, results, sides, sweep, training
from benchmarks.gpu import peers as peers_module
from benchmarks.gpu import record as record_module
from benchmarks.gpu import tests as tests_module
from benchmarks.quality import models as models_module
from benchmarks.quality import runs as runs_module
from lightning_dsmoe import (
    Decoder,
    SelectionPlan,
)

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
    lacking = ("jsonargparse", "transformers")
    monkeypatch.setattr(gpu.main, "find_spec", lambda n: None if n in lacking else find_spec(n))
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", f"--out={tmp_path}", f"--text={text}"])
    with pytest.raises(SystemExit) as stop:
        gpu.main.main()
    assert stop.value.code == 1
    [line] = capsys.readouterr().out.splitlines()
    left_out = "paper without transformers; quality without jsonargparse"
    assert line == f"benchmarks.gpu: packages are missing, left out: {left_out}"
    able = ("tests", "decode", "prefill", "sweep", "int8", "training")
    assert started == [f"--part={part}" for part in able]


def test_no_part_takes_longer_than_eight_minutes(gpu: SimpleNamespace) -> None:
    parts = [*gpu.main.NEEDS]
    assert parts == [*gpu.main.SECONDS] == [*gpu.main.MODULES]
    assert {*parts} == {*results.TITLES}
    assert max(gpu.main.SECONDS.values()) < gpu.main.HARD_LIMIT < 480


@pytest.mark.usefixtures("nothing_compiles")
def test_plans_are_compared_with_the_twin(gpu: SimpleNamespace, tiny: Any, tmp_path: Path) -> None:
    sizes = {"shapes": lambda: [tiny], "batch_sizes": (1, 2), "rounds": 1}
    for part, more in (("decode", {"copy_bytes": 2**16}), ("prefill", {"lengths": (4,)})):
        todo = getattr(gpu.inference, part)(CPU, math.inf, **sizes, **more)
        found = recorded(gpu, todo, tmp_path / part)
        assert found["ended"] == "complete"
        rows = found["rows"][1:] if part == "decode" else found["rows"]
        assert len(rows) == 2 * 3
        twin, everything, plan = rows[:3]
        assert [row["side"] for row in rows[:3]] == ["dense twin", "all experts", "P"]
        assert twin["speed ratio"] == twin["bound"] == 1
        assert plan["active"] < everything["active"] == 1
        assert plan["bound"] > 1 > everything["bound"]
        assert min(row["ms"] for row in rows) > 0
        if part == "prefill":
            assert plan["TFLOP/s"] > 0
            continue
        copy = found["rows"][0]["GB/s"]
        for row in rows[:3]:
            assert row["of copy"] == pytest.approx(row["GB/s"] / copy)
        assert "of copy" not in rows[3]
        in_bytes = [row["GB/s"] * row["ms"] for row in (twin, plan)]
        assert in_bytes[0] / in_bytes[1] == pytest.approx(plan["bound"])


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


@pytest.mark.parametrize("turns", [0, 1], ids=["at once", "beside the other side"])
def test_a_batch_that_does_not_fit_is_made_smaller(
    turns: int, gpu: SimpleNamespace, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = gpu.training._side

    def fits_one(decoder: Decoder, shape: tuple[int, int], *, compiled: bool) -> Any:
        made, fitting = side(decoder, shape, compiled=compiled), [1.0] * turns

        def too_large() -> float:
            if fitting:
                return fitting.pop()
            raise torch.OutOfMemoryError("no room")

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


@pytest.mark.usefixtures("nothing_compiles")
def test_the_lowest_ratio_of_all_batch_sizes_is_told(
    gpu: SimpleNamespace, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = sweep.sweep(CPU, math.inf, shapes=lambda: [tiny], batch_sizes=(1, 3), rounds=2)
    rows = recorded(gpu, todo, tmp_path)["rows"]
    measured, lowest = rows[:-3], rows[-3:]
    assert [row["side"] for row in measured] == ["dense twin", *sweep.WAYS] * 2
    assert [row["sequences"] for row in measured] == [1] * 4 + [3] * 4
    assert all(row["host waits"] is None and row["tokens/s"] > 0 for row in measured)
    for row in lowest:
        ratios = {r["sequences"]: r["speed ratio"] for r in measured if r["side"] == row["side"]}
        assert row["lowest ratio"] == min(ratios.values()) == ratios[row["at"]]
        assert row["measured sizes"] == 2
        assert 0 < row["active"] < 1


def test_each_way_is_the_one_that_is_measured(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def forward(engine: Any, tokens_BT: torch.Tensor, *args: Any, **options: Any) -> Any:
        pays = engines.gpu_costs.grouping_pays(1, 1, 1, 1, 1, 1)
        seen.append((engine.switch_points[:2], pays))
        return SimpleNamespace(logits=torch.zeros(len(tokens_BT), 1, 32))

    monkeypatch.setattr(engines.Engine, "forward", forward)
    decoder = engines.packed_on(CPU, tiny.sparse)
    for way in sweep.WAYS:
        reader = engines.EngineReader(decoder, SelectionPlan(), 8, way=way)
        reader.start(torch.zeros(2, 4, dtype=torch.long))
    assert seen == [((48, 1), False), ((0, 2**31), False), ((0, 1), True)]


@pytest.mark.usefixtures("nothing_compiles")
def test_eight_bits_are_compared_with_bfloat16(
    gpu: SimpleNamespace, tiny: Any, tmp_path: Path
) -> None:
    todo = int8.int8(CPU, math.inf, shapes=lambda: [tiny], batch_sizes=(1, 2), rounds=1)
    rows = recorded(gpu, todo, tmp_path)["rows"]
    assert [row["side"] for row in rows] == ["bfloat16", "int8"] * 3
    assert 1 < rows[1]["bound"] < 2
    assert rows[0]["speed ratio"] == rows[0]["bound"] == 1
    assert "bound" not in rows[2]
    assert rows[-1]["weights GB"] < rows[-2]["weights GB"]


def test_codes_are_those_of_bitsandbytes_but_for_rounding() -> None:
    from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights, quantize_int8

    weights = RowMajorWeights(torch.randn(3, 8, 16), transposed=True)
    ours, theirs = engines.rounded_to_int8(weights), quantize_int8(weights)
    assert torch.equal(ours.scales, theirs.scales)
    assert (ours.weight.int() - theirs.weight.int()).abs().max() <= 1
    assert (ours.dtype, ours.transposed) == (theirs.dtype, theirs.transposed)


TINY_PEERS = {
    "Mistral": {"num_hidden_layers": 2, "head_dim": 8},
    "Qwen2Moe": {
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "DeepseekV2": peers_module.DEEPSEEK_MOE_16B
    | {
        "num_hidden_layers": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}
TINY_SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.usefixtures("nothing_compiles")
def test_the_papers_table(
    gpu: SimpleNamespace, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(kind: str, sizes: dict[str, Any], device: torch.device) -> Any:
        return peers_module.peer(kind, TINY_PEERS[kind] | TINY_SIZES, device)

    modes = []

    def compiled(function: Any, *, mode: str | None) -> Any:
        modes.append(mode)
        return function

    for name, short in (("PROMPT", 8), ("STEPS", 2), ("LENGTH", 16)):
        monkeypatch.setattr(paper, name, short)
    monkeypatch.setattr(paper, "peer", model)
    monkeypatch.setattr(paper, "paper_models", lambda size: tiny)
    monkeypatch.setattr(torch, "compile", compiled)
    rows = recorded(gpu, paper.paper(CPU, math.inf, most_sequences=32), tmp_path)["rows"]
    assert not [row["error"] for row in rows if "error" in row]
    ways = [(row["model"], row["way"]) for row in rows]
    assert ways[:2] == [("DS-MoE-6B", "P"), ("Dense-6B", "this engine")]
    assert len({*ways}) == len(ways) == 3 * 2 + 4
    assert modes == [None]
    for row in rows:
        assert row["latency, ms"] > 0
        static = row["way"].endswith("compiled")
        assert ("largest batch" in row) == (not static)
        if not static:
            assert row["largest batch"] == 32
            assert row["best: tokens/s"] >= row["largest: tokens/s"] > 0
            assert row["input tokens/s"] > 0
    assert rows[0]["paper: tokens/s, H100, vLLM"] == 4603.9
    assert rows[0]["active"] < 1 == rows[1]["active"]


def test_batches_double_until_one_does_not_fit() -> None:
    def fits_eight(size: int) -> float:
        if size > 8:
            raise torch.OutOfMemoryError("no room")
        return 1.0

    found = paper.doubled(fits_eight, most=64, until=math.inf)
    assert (found.seconds, found.ended) == ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, "memory")
    found = paper.doubled(lambda size: float(size), most=64, until=math.inf, enough=1.02)
    assert (found.seconds, found.ended) == ({1: 1.0, 2: 2.0}, "no gain")
    assert paper.doubled(fits_eight, most=4, until=math.inf).ended == "the largest tried"
    found = paper.doubled(fits_eight, most=64, until=0.0, start=4)
    assert (found.seconds, found.ended) == ({4: 1.0}, "time")

    def breaks(size: int) -> float:
        raise RuntimeError("too many")

    found = paper.doubled(breaks, most=64, until=math.inf)
    assert (found.seconds, found.ended) == ({}, "RuntimeError: too many")


def test_peers_have_the_sizes_that_the_paper_tells() -> None:
    for kind, sizes, total in (
        ("Mistral", peers_module.MISTRAL_7B, 7.2e9),
        ("Qwen2Moe", peers_module.QWEN_MOE_A2_7B, 14.3e9),
        ("DeepseekV2", peers_module.DEEPSEEK_MOE_16B, 16.3e9),
    ):
        made = peers_module.peer(kind, sizes, torch.device("meta"))
        assert sum(p.numel() for p in made.parameters()) == pytest.approx(total, rel=0.02)


def test_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    prompts = ["called a synchronizing CUDA operation"] * 5

    def step() -> None:
        for text in (
            "called a synchronizing CUDA operation",
            "another one",
            "synchronizing CUDA operation",
            *prompts,
        ):
            warnings.warn(text, stacklevel=1)
        prompts.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert engines.host_waits(step, torch.device("cuda")) == 2
    assert modes == ["warn", "default"]
    assert engines.host_waits(lambda: pytest.fail("was run"), CPU) is None


def test_tables_of_the_page_come_from_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"gpu": "NVIDIA H200", "torch": "2.11", "driver": "1", "commit": None, "date": "today"}

    def write(part: str, rows: list[dict[str, Any]], ended: str = "complete") -> None:
        found = {"part": part, "machine": about, "ended": ended, "rows": rows}
        (tmp_path / f"{part}.json").write_text(json.dumps(found))

    at_29 = {"model": "6B", "side": "paper, 29 %", "sequences": 1}
    write(
        "decode",
        [
            {"side": "copy within memory", "GB/s": 4000.0},
            at_29
            | {"of copy": 0.71, "speed ratio": 2.1, "bound": 3.0, "host waits": 2, "low": 9.0},
        ],
    )
    write("sweep", [{"side": "by itself", "speed ratio": x} for x in (1.2, 0.98)], "time was up")
    write(
        "paper",
        [
            {"model": "DS-MoE-6B", "way": "paper, 29 %", "latency, ms": 2.0},
            {"model": "Mistral-7B", "way": "transformers, eager", "latency, ms": 7.0},
        ],
    )
    monkeypatch.setattr(sys, "argv", ["results", str(tmp_path)])
    results.main()
    lines = capsys.readouterr().out.splitlines()
    told = {line.split(" | ")[0][2:]: line.split(" | ")[1:4] for line in lines if line[:2] == "| "}
    assert told[results.AIMS[0].figure] == ["at least 0.7", "0.71", "yes"]
    assert told[results.AIMS[1].figure][1:] == ["not yet: `make gpu PART=int8`", ""]
    assert told[results.AIMS[2].figure] == ["at least 0.8", "0.7", "no"]
    assert told[results.AIMS[3].figure] == ["at least 3", "3.5", "yes"]
    assert told[results.AIMS[4].figure][1] == "not yet: `make gpu PART=paper`"
    assert told["1 to 4,096 sequences: the lowest ratio to the dense twin"][1:] == ["0.98", "yes"]
    assert told["times that decoding waits for the GPU"] == ["at most 0", "2", "no"]
    assert "NVIDIA H200, torch 2.11, driver 1, today. Ended: time was up." in lines
    assert [line for line in lines if line.startswith("### ")] == [
        "### Decoding",
        "### 1 to 4,096 sequences",
        "### The paper's throughput table",
    ]
    assert not [line for line in lines if "low |" in line]


def test_every_aim_names_what_its_part_measures(tiny: Any) -> None:
    """Names of sides, ways and models that the aims look for are those of the parts."""
    names = {(each.name, each.way) for each in paper.contenders()}
    assert ("DS-MoE-6B", "paper, 29 %") in names
    assert {way for name, way in names if name == "Mistral-7B"} == {
        "transformers, eager",
        "transformers, static cache, compiled",
    }
    assert {"paper, 29 %"} <= {*sides.paper_models("6B").plans}
    assert "6B" in [models.name for models in inference.measured_shapes()]
    assert {aim.part for aim in results.AIMS} <= {*main.NEEDS}


def test_without_results_it_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["results", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"there is no result of a part in "):
        results.main()


@pytest.mark.parametrize(("size", "share"), [("1B", 0.41), ("3B", 0.39), ("6B", 0.29)])
def test_plans_run_the_shares_of_the_paper(size: str, share: float) -> None:
    models = sides.paper_models(size)
    sparse = sides.made_on(torch.device("meta"), models.sparse)
    plan = list(models.plans.values())[-1]
    assert inference.hidden_share(sparse, plan) == pytest.approx(share, abs=0.01)

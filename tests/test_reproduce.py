"""The benchmark of the paper's claims: what it trains, how it measures, how it judges."""

import copy
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jsonargparse
import pytest
import torch
from torch.nn import functional as F

from lightning_dsmoe import (
    Decoder,
    DSMoELanguageModel,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    TopK,
    compile_sparse,
)
from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.routing_statistics import RouterStatistics, Statistics
from lightning_dsmoe.commands.trained import Trained
from lightning_dsmoe.data.tokenizers import ByteTokenizer
from lightning_dsmoe.inference import SwitchPoints
from lightning_dsmoe.metrics import count_parameters

FOLDER = Path(__file__).parents[1] / "benchmarks"
OWN = (
    "timing",
    "reproduce_models",
    "reproduce_frontier",
    "reproduce_runs",
    "comparisons",
    "claims",
    "reproduce_report",
    "reproduce",
    "calibration",
)


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in OWN})
    for name in OWN:
        sys.modules.pop(name, None)


@pytest.fixture
def models(benchmark_modules: SimpleNamespace) -> ModuleType:
    module: ModuleType = benchmark_modules.reproduce_models
    return module


@pytest.fixture
def claims(benchmark_modules: SimpleNamespace) -> ModuleType:
    module: ModuleType = benchmark_modules.claims
    return module


def sizes(models: ModuleType, name: str, preset: str) -> tuple[int, int, int]:
    """All, hidden, and running hidden parameters of a model as it is trained."""
    config = models.configuration(name, models.PRESETS[preset], seed=1, steps=10)["model"]
    config["init_args"]["vocab_size"] = 65
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(DSMoELanguageModel, "model")
    with torch.device("meta"):
        model = parser.instantiate(parser.parse_object({"model": config})).model
        model.configure_model()
    counts = count_parameters(model.decoder)
    running = counts.always
    for layers, selections in (
        (counts.experts, model.plan.experts),
        (counts.attention, model.plan.attention),
    ):
        for layer, selection in zip(layers, selections, strict=True):
            if layer is not None:
                running += layer.per_expert * getattr(selection, "k", layer.n_experts)
    return counts.outside + counts.hidden, counts.hidden, running


@pytest.mark.parametrize("preset", ["cpu", "gpu"], ids=["small", "large"])
def test_models_have_the_sizes_that_their_names_say(models: ModuleType, preset: str) -> None:
    _, hidden, _ = sizes(models, models.DS_MOE["strong MI"], preset)
    _, dense, _ = sizes(models, models.DENSE, preset)
    _, small, small_running = sizes(models, models.SMALL_DENSE, preset)
    _, same, running = sizes(models, models.SAME_TOTAL, preset)
    _, larger, larger_running = sizes(models, models.SAME_ACTIVE, preset)
    _, top_1, fewest = sizes(models, models.TOP_1, preset)
    assert small == small_running
    assert top_1 == hidden
    assert dense == pytest.approx(hidden, rel=0.02)
    assert same == pytest.approx(hidden, rel=0.02)
    assert larger > 1.6 * hidden
    assert larger_running == pytest.approx(running, rel=0.05)
    assert small == pytest.approx(running, rel=0.05)
    assert 0.3 < running / same < 0.4
    assert fewest / top_1 < 0.15


def test_the_gpu_preset_has_the_size_of_nanogpts(models: ModuleType) -> None:
    assert sizes(models, models.DENSE, "gpu")[0] == pytest.approx(10.7e6, rel=0.01)


def test_only_the_weight_of_the_mutual_information_tells_ds_moe_models_apart(
    models: ModuleType,
) -> None:
    weights, rest = [], []
    for name in models.DS_MOE.values():
        config = models.configuration(name, models.PRESETS["cpu"], seed=1, steps=2000)
        arguments = config["model"]["init_args"]
        weights.append([arguments.pop(f"{kind}_mi_weight") for kind in ("expert", "attention")])
        rest.append(config)
    assert rest[0] == rest[1] == rest[2]
    assert weights == sorted(weights)
    assert weights[0][0] < weights[1][0] < weights[2][0]


def test_a_short_run_has_a_shorter_warm_up_and_one_validation(models: ModuleType) -> None:
    config = models.configuration(models.DENSE, models.PRESETS["gpu"], seed=7, steps=40)
    schedule = config["model"]["init_args"]["lr_scheduler"]["init_args"]
    assert (schedule["max_steps"], schedule["warmup_steps"]) == (40, 2)
    assert config["trainer"]["val_check_interval"] == config["trainer"]["max_steps"] == 40
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 7


def tiny(models: ModuleType) -> Any:
    changes = {
        "model": {"d_model": 16, "n_layers": 2},
        "attention": {"n_experts": 2, "n_heads": 1, "d_head": 8},
        "feed_forward": {"n_experts": 6, "d_expert": 4},
        "data": {"context": 16, "batch_size": 4},
        "trainer": {"accelerator": "cpu"},
    }
    return models.Preset(2, None, changes)


@pytest.mark.parametrize("name", ["DENSE", "SAME_ACTIVE", "strong MI"])
def test_a_run_trains_and_measures(
    benchmark_modules: SimpleNamespace,
    models: ModuleType,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    monkeypatch.setattr(benchmark_modules.reproduce_runs, "BATCH_TOKENS", 256)
    model = models.DS_MOE.get(name) or getattr(models, name)
    configuration = models.configuration(model, tiny(models), seed=1, steps=2)
    settings = {"shares": [0.1, 0.75], "eps": 0.48, "configuration": configuration}
    run = benchmark_modules.reproduce_runs.carry_out(settings, str(text), threads=1)
    assert json.loads(json.dumps(run))["settings"] == settings
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    first, *points = run["points"]
    assert (first["rule"], first["share"]) == ("all", 1.0)
    rules = {point["rule"] for point in points}
    trained = {"as trained"} if name == "SAME_ACTIVE" else set()
    assert rules == (set() if name == "DENSE" else {"threshold", "top-k"} | trained)
    for point in points:
        assert point["budget"] != 0.1  # less than one expert of each router
        assert point["share"] <= point["budget"] + 0.01
        assert math.isfinite(point["loss"])
    routed = {kind for kind, found in run["running"].items() if found}
    assert routed == {"DENSE": set(), "SAME_ACTIVE": {"experts"}}.get(
        name, {"experts", "attention"}
    )


@pytest.mark.parametrize(
    "callbacks", [["MIWeightAnnealing"], ["SparsityTarget"], ["SparseFinishing"]], ids=str
)
def test_other_ways_of_training(
    benchmark_modules: SimpleNamespace,
    models: ModuleType,
    callbacks: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    found = {
        name: [c["class_path"].rpartition(".")[2] for c in models.further_callbacks(name, 2000)]
        for name in (*models.MODELS, *models.OTHER_WAYS)
    }
    assert not any(found[name] for name in models.MODELS)
    name = next(name for name in models.OTHER_WAYS if found[name] == callbacks)
    configuration = models.configuration(name, tiny(models), seed=1, steps=2)
    settings = {"shares": [], "eps": 0.48, "configuration": configuration}
    benchmark_modules.reproduce_runs.BATCH_TOKENS = 256
    kept = tmp_path / "kept" / "model.ckpt"
    run = benchmark_modules.reproduce_runs.carry_out(settings, str(text), 1, str(kept))
    assert run["points"][0]["rule"] == "all"
    rows = benchmark_modules.calibration.compare(kept, str(text), [0.1, 0.6], 0.5, 10**6)
    assert [row["budget"] for row in rows] == [0.6]  # less than one expert of each is left out
    assert rows[0]["uniform_share"] <= rows[0]["share"] + 1e-9
    assert "| model | 60% |" in benchmark_modules.calibration.table(rows)


def test_plans_are_measured_as_a_plain_loop_does(benchmark_modules: SimpleNamespace) -> None:
    decoder = Decoder(
        11,
        16,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=3, n_heads=1, d_head=8),
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=4),
    ).eval()
    for block in decoder.blocks:
        for layer in (block.attention, block.feed_forward):
            torch.nn.init.normal_(layer.router.weight)
    batches = [tuple(torch.randint(11, (2, 2, 16))) for _ in range(5)]
    counts, plan = count_parameters(decoder), SelectionPlan.uniform(2)
    model = compile_sparse(decoder, plan, switch_points=SwitchPoints(gather_up_to=0))
    trained = Trained(model, counts, HeldOut(batches, 160), ByteTokenizer())
    found = benchmark_modules.reproduce_frontier.measure(trained, plan, [0.8], 0.48)

    def loss(plan: SelectionPlan) -> float:
        losses = [
            F.cross_entropy(decoder(inputs, plan).logits.flatten(0, 1), labels.flatten())
            for inputs, labels in batches
        ]
        return torch.stack(losses).mean().item()

    assert found["points"][0]["loss"] == pytest.approx(loss(plan), rel=1e-5)
    fixed = [point for point in found["points"] if point["plan"].startswith("top")]
    assert [point["rule"] for point in fixed] == ["threshold", "top-k"]
    for point in fixed:
        k, heads = (int(number) for number in re.findall(r"\d+", point["plan"]))
        of_heads = SelectionPlan.uniform(2, experts=TopK(k), attention=TopK(heads))
        assert point["loss"] == pytest.approx(loss(of_heads), rel=1e-5)
        experts, attention = counts.experts[0], counts.attention[0]
        routed = 2 * (k * experts.per_expert + heads * attention.per_expert)
        assert point["share"] == pytest.approx((counts.always + routed) / counts.hidden)
    probs = [
        routing.probs for inputs, _ in batches[::4] for routing in decoder(inputs).routings.experts
    ]
    kept = torch.stack([((p * 4 > 0.48).sum(-1)).float().mean() for p in probs]).mean().item()
    assert found["running"]["experts"]["share"] == pytest.approx(kept / 4, rel=1e-5)
    assert found["running"]["experts"]["beyond_one"] == pytest.approx((kept - 1) / 3, rel=1e-5)


def test_thresholds_come_closer_to_a_share_by_what_is_measured(
    benchmark_modules: SimpleNamespace,
) -> None:
    """A model of which a tenth less runs than all experts' routing makes one think."""
    probs = torch.rand(2000, 8).softmax(-1).sort(dim=-1, descending=True).values
    statistics = Statistics([RouterStatistics(probs, 10)], [None], always=20, hidden=100)

    def measured(plan: SelectionPlan) -> float:
        return 0.9 * statistics.share([plan.experts[0].eps], [0.0])

    find = benchmark_modules.reproduce_frontier.threshold
    assert measured(find(statistics, 0.6, measured)) == pytest.approx(0.6, abs=0.002)
    assert find(statistics, 0.25, measured) is None


def test_numbers_of_experts_are_chosen_on_a_part_of_the_text(
    benchmark_modules: SimpleNamespace,
) -> None:
    labels = [torch.full((1, 3), number) for number in range(9)]
    labels[4][0, 0] = -100
    text = HeldOut([(each, each) for each in labels], 26)
    part = benchmark_modules.reproduce_frontier.every_fourth(text)
    assert [int(inputs[0, 1]) for inputs, _ in part.batches] == [0, 4, 8]
    assert part.n_tokens == 8


# Judging


def run(dense: float, points: dict[float, float] | None = None, **other: Any) -> dict[str, Any]:
    """A run with a loss with all experts, and losses under thresholds by share."""
    found = [{"rule": "all", "budget": 1.0, "share": 1.0, "loss": dense}]
    for share, loss in (points or {}).items():
        found.append({"rule": "threshold", "budget": share, "share": share, "loss": loss})
    machine = {"cpu": "none", "threads": 1, "torch": "2", "date": "2026-01-01"}
    sizes = {"parameters": 1100, "hidden": 1000, "seconds": 60.0}
    return {"points": found, "machine": machine, **sizes, **other}


def sparse(share: float, loss: float, **other: Any) -> dict[str, Any]:
    """A sparsely trained run."""
    made = run(9.0, **other)
    made["points"].append({"rule": "as trained", "budget": 1.0, "share": share, "loss": loss})
    return made


def ds_moe(dense: float, at_20: float, at_40: float, top_k: float) -> dict[str, Any]:
    shares = {"share": 0.2, "beyond_one": 0.1}, {"share": 0.5, "beyond_one": 0.3}
    made = run(dense, {0.1: 3.0, 0.2: at_20, 0.4: at_40})
    made["running"] = dict(zip(("experts", "attention"), shares, strict=True))
    made["points"].append({"rule": "top-k", "budget": 0.4, "share": 0.4, "loss": top_k})
    return made


@pytest.fixture
def all_hold(models: ModuleType) -> dict[str, dict[int, Any]]:
    """Runs of two seeds under which every claim holds."""
    weak, middle, strong = models.DS_MOE.values()
    one = {
        models.DENSE: run(2.0),
        models.SMALL_DENSE: run(2.5) | {"hidden": 350},
        models.SAME_TOTAL: sparse(0.35, 2.2),
        models.SAME_ACTIVE: sparse(0.175, 2.005, hidden=2000),
        models.TOP_1: sparse(0.1, 3.1),
        weak: ds_moe(1.9, 2.9, 2.1, 2.2),
        middle: ds_moe(1.95, 2.0, 1.96, 1.97),
        strong: ds_moe(2.1, 2.11, 2.1, 2.1),
    }
    return {name: {1: value, 2: copy.deepcopy(value)} for name, value in one.items()}


def verdicts(claims: ModuleType, runs: Any) -> list[str]:
    """Verdicts by the first letters of the claims, and the figures they can be seen from."""
    return [claim.verdict for claim in claims.judge(runs)]


def test_all_claims_can_hold(claims: ModuleType, all_hold: Any) -> None:
    assert set(verdicts(claims, all_hold)) == {"holds"}


@pytest.mark.parametrize(
    ("model", "change", "claim"),
    [
        ("DENSE", lambda r: r["points"][0].update(loss=1.95), "1. With 30%"),
        ("DENSE", lambda r: r["points"][0].update(loss=1.9), "1. With 40%"),
        (
            "SAME_TOTAL",
            lambda r: r["points"][1].update(loss=1.9),
            "2. DS-MoE is better than a sparsely",
        ),
        ("TOP_1", lambda r: r["points"][1].update(loss=2.9), "2. The same against one trained"),
        ("SAME_ACTIVE", lambda r: r["points"][1].update(loss=1.9), "2. DS-MoE is as good"),
        (
            "SMALL_DENSE",
            lambda r: r["points"][0].update(loss=1.9),
            "2. DS-MoE is better than a dense",
        ),
        ("weak MI", lambda r: r["running"]["experts"].update(beyond_one=0.4), "3."),
        ("middle MI", lambda r: r["running"]["experts"].update(share=0.6), "3."),
        ("strong MI", lambda r: r["points"][2].update(loss=2.3), "4."),
        ("weak MI", lambda r: r["points"][4].update(loss=2.0), "5."),
    ],
)
def test_each_claim_can_fail_and_be_unclear(
    claims: ModuleType,
    models: ModuleType,
    all_hold: Any,
    model: str,
    change: Callable[[dict[str, Any]], None],
    claim: str,
) -> None:
    runs = all_hold[models.DS_MOE.get(model) or getattr(models, model)]
    for seed, expected in ((1, "unclear"), (2, "fails")):
        change(runs[seed])
        judged = {c.claim: c.verdict for c in claims.judge(all_hold)}
        assert next(v for name, v in judged.items() if name.startswith(claim)) == expected


def test_one_seed_or_none_proves_nothing(claims: ModuleType, all_hold: Any) -> None:
    for by_seed in all_hold.values():
        del by_seed[2]
    assert set(verdicts(claims, all_hold)) == {"unclear"}
    assert set(verdicts(claims, {})) == {"unclear"}


def test_losses_between_plans_lie_on_a_line(benchmark_modules: SimpleNamespace) -> None:
    loss_at = benchmark_modules.comparisons.loss_at
    measured = run(1.0, {0.5: 2.0, 0.25: 4.0})
    assert [loss_at(measured, share) for share in (0.25, 0.375, 0.5, 0.75, 1.0, 1.2)] == [
        *(4.0, 3.0, 2.0, 1.5, 1.0, 1.0)
    ]
    assert loss_at(measured, 0.25 - 1e-6) == 4.0
    assert loss_at(measured, 0.2) is None


def test_models_meet_at_the_same_number_of_parameters(
    benchmark_modules: SimpleNamespace, models: ModuleType
) -> None:
    """Half of 1,500 parameters are those that three quarters of 1,000 are."""
    own = run(1.0, {0.5: 3.0})
    runs = {models.DS_MOE["weak MI"]: {1: own}, "other": {1: sparse(0.5, 1.6, hidden=1500)}}
    found = benchmark_modules.comparisons.against(runs, "other")
    assert found.differences == {1: pytest.approx(2.0 / 1.6 - 1)}


def test_report_shows_every_claim_and_run(
    benchmark_modules: SimpleNamespace, claims: ModuleType, all_hold: Any, tmp_path: Path
) -> None:
    report = benchmark_modules.reproduce_report
    all_hold["dense"][2]["points"][0]["loss"] = 1.995
    shown = report.tables(all_hold, [0.2, 0.4])
    assert "**1.9975** (1.9950 to 2.0000)" in shown
    for name in [*all_hold, *(claim.claim for claim in claims.judge(all_hold))]:
        assert f"| {name}" in shown
    report.figure(all_hold, [0.2, 0.4], tmp_path / "frontiers.svg")
    assert "<svg" in (tmp_path / "frontiers.svg").read_text()


# Runs in processes, and those that are there already


def test_calls_run_apart_and_a_failure_stops_no_other(benchmark_modules: SimpleNamespace) -> None:
    calls = [(4.0,), (-1.0,), (9.0,)]
    found = dict(benchmark_modules.reproduce.apart(math.sqrt, calls, processes=2))
    assert (found[0], found[2]) == (2.0, 3.0)
    assert isinstance(found[1], ValueError)
    [(_, process)] = benchmark_modules.reproduce.apart(os.getpid, [()], processes=1)
    assert process != os.getpid()


def test_runs_that_are_there_are_not_repeated(
    benchmark_modules: SimpleNamespace,
    models: ModuleType,
    all_hold: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reproduce = benchmark_modules.reproduce
    done: list[str] = []

    def apart(function: object, calls: list[Any], *, processes: int) -> Iterator[tuple[int, Any]]:
        for place, (settings, *_) in enumerate(calls):
            if settings["model"] == failing:
                yield place, MemoryError("no room")
                continue
            done.append(f"{settings['model']}, {settings['seed']}")
            yield place, all_hold[settings["model"]][1] | {"settings": settings}

    def start(*arguments: str) -> None:
        words = ["--text", "text.txt", "--json", "runs.json", "--output", "claims.md"]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *words, *arguments])
        done.clear()
        reproduce.main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(reproduce, "apart", apart)
    Path("text.txt").write_text("one text")
    failing = models.DENSE
    with pytest.raises(SystemExit, match="1 of 8 runs failed"):
        start("--seeds", "1")
    assert len(done) == 7
    failing = ""
    start("--seeds", "1")
    assert done == ["dense, 1"]
    assert Path("claims.md").read_text() in capsys.readouterr().out
    start("--seeds", "1", "2")
    assert {name[-1] for name in done} == {"2"}
    start("--seeds", "1", "2")
    assert not done
    start("--seeds", "1", "--steps", "7")
    assert len(done) == 8
    Path("text.txt").write_text("another text")
    start("--seeds", "1")
    assert len(done) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "none.txt"], "there is no file none.txt"),
        (["--text", "text.txt", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["--text", "text.txt", "--picture", "a.txt"], "--picture must end in .svg or .png"),
    ],
)
def test_mistakes_are_said_in_one_line(
    benchmark_modules: SimpleNamespace,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark_modules.reproduce.main()
    assert message in capsys.readouterr().err

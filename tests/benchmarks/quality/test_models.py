"""The models of the benchmark of the paper's claims."""

from importlib.resources import files
from types import ModuleType
from typing import Any

import jsonargparse
import pytest
import torch
import yaml

from lightning_dsmoe import DSMoELanguageModel, routed_layers
from lightning_dsmoe.metrics import count_parameters


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
    for name, selection in model.plan.selections(routed_layers(model.decoder)).items():
        layer = counts.layers[name]
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
    for name in models.EVERY_DS_MOE.values():
        config = models.configuration(name, models.PRESETS["cpu"], seed=1, steps=2000)
        arguments = config["model"]["init_args"]
        weights.append([arguments.pop(f"{kind}_mi_weight") for kind in ("expert", "attention")])
        rest.append(config)
    assert all(other == rest[0] for other in rest)
    assert [expert for expert, _ in weights] == [0.001, 0.0025, 0.005, 0.01, 0.02, 0.05]
    assert [attention for _, attention in weights] == [0.001, 0.0025, 0.005, 0.01, 0.02, 0.1]


@pytest.mark.parametrize(
    ("finishing", "selections", "steps"),
    [
        ("finished sparsely", ("Threshold", {"eps": 0.3}, {"eps": 0.3}), 400),
        ("finished more sparsely", ("Threshold", {"eps": 1.5}, {"eps": 1.5}), 1000),
        (
            "finished consistently at threshold 2",
            ("Threshold", {"eps": 2.0}, {"eps": 2.0}),
            1000,
        ),
        ("finished at fixed numbers", ("TopK", {"k": 2}, {"k": 5}), 1000),
        ("finished consistently", ("TopK", {"k": 2}, {"k": 5}), 1000),
        ("finished consistently by turns", ("TopK", {"k": 2}, {"k": 5}), 1000),
    ],
)
def test_models_are_finished_under_a_plan(
    models: ModuleType, finishing: str, selections: tuple[str, Any, Any], steps: int
) -> None:
    [callback] = models.further_callbacks(f"DS-MoE, faint MI, {finishing}", 2000)
    assert callback["init_args"]["steps"] == steps
    kind, *options = selections
    assert callback["init_args"]["plan"] == {
        name: {"class_path": f"lightning_dsmoe.{kind}", "init_args": given}
        for name, given in zip(("experts", "attention"), options, strict=True)
    }


def test_some_models_are_finished_under_two_plans_by_turns(models: ModuleType) -> None:
    name = "DS-MoE, light MI, finished consistently"
    once, turns = (models.further_callbacks(each, 9)[0] for each in (name, f"{name} by turns"))
    kept = {"class_path": "lightning_dsmoe.Threshold", "init_args": {"eps": 1.0}}
    assert turns["init_args"].pop("alternate_with") == [{"experts": kept, "attention": kept}]
    assert turns == once


def test_the_long_recipe_is_what_was_measured(models: ModuleType) -> None:
    path = files("lightning_dsmoe.cli_configs").joinpath("shakespeare_long.yaml")
    shipped = yaml.safe_load(path.read_text(encoding="utf-8"))
    name = "DS-MoE, faint MI, finished consistently"
    measured = models.configuration(name, models.PRESETS["cpu"], seed=1, steps=16_000)
    nano = yaml.safe_load(path.with_name(models.RECIPE).read_text(encoding="utf-8"))
    merged = nano["model"]["init_args"] | shipped["model"]["init_args"]
    schedules = [each["model"]["init_args"]["lr_scheduler"] for each in (nano, shipped)]
    arguments = schedules[0]["init_args"] | schedules[1]["init_args"]
    merged["lr_scheduler"] = schedules[1] | {"init_args": arguments}
    assert merged == measured["model"]["init_args"]
    assert shipped["trainer"]["max_steps"] == measured["trainer"]["max_steps"]
    assert shipped["trainer"]["callbacks+"] == measured["trainer"]["callbacks"][1:]


def test_some_ways_of_finishing_are_consistent(models: ModuleType) -> None:
    arguments = {
        name: models.configuration(name, models.PRESETS["cpu"], seed=1, steps=9)["model"]
        for name in models.FINISHED
    }
    weights = {
        name: model["init_args"].get("consistency_weight") for name, model in arguments.items()
    }
    assert {name for name, weight in weights.items() if weight} == {
        f"{name}, {finishing}"
        for name in models.EVERY_DS_MOE.values()
        for finishing in models.FINISHINGS
        if "consistently" in finishing
    }
    assert set(weights.values()) == {None, 1.0}


@pytest.mark.parametrize("ending", ["finished", "finished consistently"])
def test_the_weights_of_some_recipes_fall(models: ModuleType, ending: str) -> None:
    name = f"DS-MoE, falling MI, {ending}"
    config = models.configuration(name, models.PRESETS["cpu"], seed=1, steps=2000)
    arguments = config["model"]["init_args"]
    assert arguments.get("consistency_weight") == (1.0 if "consistently" in ending else None)
    assert arguments["expert_mi_weight"] == arguments["attention_mi_weight"] == 0.015
    _, fall, finishing = (c["init_args"] for c in config["trainer"]["callbacks"])
    assert fall == {"start": 1.0, "end": 0.0, "steps": 2000}
    assert finishing["steps"] == 800
    assert finishing["plan"]["experts"]["init_args"] == {"eps": 0.5}


def test_a_short_run_has_a_shorter_warm_up_and_one_validation(models: ModuleType) -> None:
    config = models.configuration(models.DENSE, models.PRESETS["gpu"], seed=7, steps=40)
    schedule = config["model"]["init_args"]["lr_scheduler"]["init_args"]
    assert (schedule["max_steps"], schedule["warmup_steps"]) == (40, 2)
    assert config["trainer"]["val_check_interval"] == config["trainer"]["max_steps"] == 40
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 7

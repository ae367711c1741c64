"""Callbacks as a configuration names them."""

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning import Callback

from lightning_dsmoe.callbacks import (
    ExpertUtilizationMonitor,
    MIWeightAnnealing,
    RouterCollapseAlarm,
    SkipNonFiniteSteps,
    SparseEvaluation,
    SparseFinishing,
    SparsityTarget,
)
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK, TopP


def parse(callbacks: str) -> list[Callback]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    config: Any = parser.parse_object({"callbacks": yaml.safe_load(callbacks)})
    made: list[Callback] = parser.instantiate(config).callbacks
    return made


def test_every_callback_by_its_class_path(tmp_path: Path) -> None:
    saved = SelectionPlan(experts=TopP(0.9))
    saved.save(tmp_path / "plan.json")
    monitor, annealing, sparse, target, finishing = parse(
        f"""
        - class_path: lightning_dsmoe.callbacks.ExpertUtilizationMonitor
          init_args: {{every_n_steps: 20, window: 5}}
        - class_path: lightning_dsmoe.callbacks.MIWeightAnnealing
          init_args: {{schedule: constant_then_ramp, start: 1, end: 0.5, steps: 10, delay: 4}}
        - class_path: lightning_dsmoe.callbacks.SparseEvaluation
          init_args:
            plans:
              saved: {tmp_path}/plan.json
              top_2:
                experts: {{class_path: TopK, init_args: {{k: 2, renormalize: true}}}}
              two_layers:
                attention: {{class_path: AllExperts}}
                layers:
                  blocks.0.feed_forward:
                    class_path: lightning_dsmoe.routing.Threshold
                    init_args: {{eps: 1.0}}
                  blocks.1.attention: {{class_path: TopK, init_args: {{k: 1}}}}
        - class_path: lightning_dsmoe.callbacks.SparsityTarget
          init_args: {{expert_top_k: 2, mass: 0.9, rate: 1.2, every: 5, delay: 0}}
        - class_path: lightning_dsmoe.callbacks.SparseFinishing
          init_args:
            plan: {tmp_path}/plan.json
            alternate_with:
              - experts: {{class_path: TopK, init_args: {{k: 3}}}}
              - {tmp_path}/plan.json
            steps: 7
        """
    )
    assert isinstance(monitor, ExpertUtilizationMonitor)
    assert (monitor.every_n_steps, monitor.window) == (20, 5)
    assert isinstance(annealing, MIWeightAnnealing)
    assert [annealing.factor(step) for step in (0, 4, 9, 14)] == [1, 1, 0.75, 0.5]
    assert isinstance(sparse, SparseEvaluation)
    assert sparse.plans == {
        "saved": saved,
        "top_2": SelectionPlan(experts=TopK(2, renormalize=True)),
        "two_layers": SelectionPlan(
            layers={"blocks.0.feed_forward": Threshold(1.0), "blocks.1.attention": TopK(1)}
        ),
    }
    assert isinstance(target, SparsityTarget)
    assert target.top_k == {"experts": 2}
    assert (*astuple(target.controller)[:2], target.every, target.delay) == (0.9, 1.2, 5, 0)
    assert isinstance(finishing, SparseFinishing)
    assert finishing.plans == [saved, SelectionPlan(experts=TopK(3)), saved]
    assert finishing.steps == 7


LAYERS = "{blocks.3.feed_forward: {class_path: Threshold, init_args: {eps: 0.5}}}"


@pytest.mark.parametrize(
    "plan", ["{}", "{experts: {class_path: TopK, init_args: {k: 3}}, layers: %s}", "plan.json"]
)
def test_a_plan_that_was_printed_is_the_same(plan: str) -> None:
    given = yaml.safe_load("[{class_path: SparseEvaluation, init_args: {plans: {it: PLAN}}}]")
    given[0]["init_args"]["plans"]["it"] = yaml.safe_load(plan.replace("%s", LAYERS))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    config = parser.parse_object({"callbacks": given})
    assert parser.parse_string(parser.dump(config)) == config


def test_a_plan_by_the_class_path_of_version_0_1() -> None:
    with pytest.warns(DeprecationWarning, match="LayerSelections is now SelectionPlan"):
        [finishing] = parse(
            """
            - class_path: lightning_dsmoe.callbacks.SparseFinishing
              init_args:
                plan:
                  class_path: lightning_dsmoe.callbacks.LayerSelections
                  init_args: {experts: {class_path: TopK, init_args: {k: 3}}}
                steps: 7
            """
        )
    assert isinstance(finishing, SparseFinishing)
    assert finishing.plans == [SelectionPlan(TopK(3))]


def test_the_old_name_of_a_plan() -> None:
    import lightning_dsmoe.callbacks

    message = "LayerSelections is now SelectionPlan; the old name goes with version 0.3"
    with pytest.warns(DeprecationWarning, match=message):
        assert lightning_dsmoe.callbacks.LayerSelections is SelectionPlan
    with pytest.raises(AttributeError, match="no attribute 'Selections'"):
        _ = lightning_dsmoe.callbacks.Selections


def test_the_old_name_of_further_plans_still_works() -> None:
    with pytest.warns(DeprecationWarning, match=r"turns_with is now alternate_with; .* 0\.3$"):
        [finishing] = parse(
            """
            - class_path: lightning_dsmoe.callbacks.SparseFinishing
              init_args:
                plan: {}
                steps: 7
                turns_with: [{experts: {class_path: TopK, init_args: {k: 3}}}]
            """
        )
    assert isinstance(finishing, SparseFinishing)
    assert finishing.plans == [SelectionPlan(), SelectionPlan(experts=TopK(3))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{class_path: MIWeightAnnealing, init_args: {schedule: stairs, steps: 5}}", "stairs"),
        ("{class_path: MIWeightAnnealing, init_args: {steps: 0}}", "steps must be at least 1"),
        (
            "{class_path: SparseEvaluation, init_args: {plans: {p: {experts: "
            "{class_path: TopK, init_args: {k: 0}}}}}}",
            "k=0",
        ),
        ("{class_path: SparsityTarget, init_args: {mass: 0.9}}", "got None and None"),
        ("{class_path: SparsityTarget, init_args: {expert_top_k: 1.5}}", "expert_top_k"),
        ("{class_path: SparseFinishing, init_args: {plan: {}, steps: 0}}", "steps must be at"),
    ],
)
def test_mistakes_are_named(options: str, message: str) -> None:
    with pytest.raises((ArgumentError, ValueError), match=message):
        parse(f"- {options}")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            MIWeightAnnealing,
            {"schedule": "constant_then_ramp", "start": 2.0, "end": 0.5, "steps": 3, "delay": 4},
        ),
        (
            SparsityTarget,
            {"mass": 0.9, "rate": 1.2, "every": 5, "smoothing": 0.1, "ahead": 2.0, "delay": 7}
            | {"least": 0.5, "most": 3.0},
        ),
        (ExpertUtilizationMonitor, {"every_n_steps": 20, "window": 5, "dead_share": 0.2}),
    ],
)
def test_options_are_attributes_of_the_same_name(kind: type, options: dict[str, Any]) -> None:
    more = {"expert_top_k": 2} if kind is SparsityTarget else {}
    callback = kind(**options, **more)
    assert {name: getattr(callback, name) for name in options} == options


def test_guards_by_their_class_paths() -> None:
    skip, alarm = parse(
        """
        - class_path: lightning_dsmoe.callbacks.SkipNonFiniteSteps
          init_args: {limit: 3}
        - class_path: lightning_dsmoe.callbacks.RouterCollapseAlarm
          init_args: {share: 0.25, patience: 2, every_n_steps: 10, stop: true}
        """
    )
    assert isinstance(skip, SkipNonFiniteSteps)
    assert skip.limit == 3
    assert isinstance(alarm, RouterCollapseAlarm)
    assert (alarm.share, alarm.patience, alarm.every_n_steps, alarm.stop) == (0.25, 2, 10, True)

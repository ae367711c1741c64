import json
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.routing import (
    AllExperts,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)
from lightning_dsmoe.routing.plan import describe, describe_selections

OWN: Any = print  # any callable may be a selection
PLAN = SelectionPlan(
    experts=(TopK(2), Threshold(0.5, renormalize=True), ThresholdTopK(0.48)),
    attention=(AllExperts(), TopP(0.9), TopK(1, renormalize=True)),
)


def data_with(**fields: Any) -> dict[str, Any]:
    return SelectionPlan.uniform(1).to_dict() | fields


def test_uniform_is_dense_unless_told() -> None:
    assert SelectionPlan.uniform(2) == SelectionPlan((AllExperts(),) * 2, (AllExperts(),) * 2)
    plan = SelectionPlan.uniform(2, experts=TopK(1))
    assert plan == SelectionPlan((TopK(1),) * 2, (AllExperts(),) * 2)
    assert plan.n_layers == 2


def test_json_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "new" / "plan.json")
    assert SelectionPlan.load(tmp_path / "new" / "plan.json") == PLAN
    assert SelectionPlan.from_dict(PLAN.to_dict()) == PLAN


@pytest.mark.parametrize("sizes", [(0, 0), (1, 2), (2, 1)])
def test_lists_of_different_or_no_length_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"got {sizes[0]} and {sizes[1]}"):
        SelectionPlan((TopK(1),) * sizes[0], (TopK(1),) * sizes[1])


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param({"selection": "Nobody"}, id="unknown"),
        pytest.param({"selection": "Selection"}, id="abstract"),
        pytest.param({"selection": ["TopK"]}, id="name that is a list"),
        pytest.param({"k": 2}, id="no name"),
        pytest.param("TopK", id="text"),
        pytest.param(None, id="null"),
        pytest.param({"selection": "TopK"}, id="missing option"),
        pytest.param({"selection": "TopK", "k": 2, "eps": 1}, id="option too many"),
        pytest.param({"selection": "TopK", "k": True}, id="bool k"),
        pytest.param({"selection": "TopK", "k": 2.0}, id="float k"),
        pytest.param({"selection": "TopK", "k": 2, "renormalize": "no"}, id="text for a flag"),
        pytest.param({"selection": "Threshold", "eps": float("nan")}, id="nan eps"),
        pytest.param({"selection": "Threshold", "eps": "0.5"}, id="text eps"),
        pytest.param({"selection": "Threshold", "eps": [1]}, id="list eps"),
        pytest.param({"selection": "TopP", "p": {}}, id="object p"),
    ],
)
def test_bad_selections_are_refused(selection: object, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data_with(experts=[selection])))
    with pytest.raises(ValueError, match=r"plan\.json: "):
        SelectionPlan.load(file)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param([], id="list"),
        pytest.param({}, id="empty"),
        pytest.param(data_with(extra=1), id="unknown field"),
        pytest.param(data_with(format_version=2), id="newer format"),
        pytest.param(data_with(experts="TopK"), id="text for a list"),
        pytest.param(data_with(experts=[{"selection": "AllExperts"}] * 1025), id="huge list"),
        pytest.param(data_with(experts=[]), id="no layers"),
    ],
)
def test_other_data_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="plan"):
        SelectionPlan.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000, "1" * 5_000], ids=len)
def test_files_that_are_no_json_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json is not JSON: "):
        SelectionPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": [{"selection": "x" * 100_000}]}, "is not a selection"),
        ({"format_version": "x" * 100_000}, "this version reads 1"),
    ],
)
def test_messages_stay_short(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SelectionPlan.from_dict(data_with(**change))
    assert len(str(error.value)) < 1_000


def test_check_names_layer_and_kind() -> None:
    PLAN.check([4, 4, 4], [2, 2, None])
    with pytest.raises(ValueError, match=r"plan, layer 0, experts: TopK\(k=2\) needs k <= 1"):
        PLAN.check([1, 4, 4], [2, 2, 2])
    with pytest.raises(ValueError, match="a plan of 3 layers, a model of 2"):
        PLAN.check([4, 4], [2, 2])


def test_plans_in_words() -> None:
    plan = SelectionPlan((TopK(2), TopK(2), TopK(3)), (TopP(0.9), TopP(0.9, renormalize=True), OWN))
    assert describe(plan) == (
        "experts: top 2 to 3 by layer; attention: top-p 0.9 in 1 layer, "
        f"top-p 0.9 renormalized in 1 layer, {OWN} in 1 layer"
    )
    assert describe(SelectionPlan.uniform(2)) == "experts: all; attention: all"
    thresholds = (ThresholdTopK(1 / 3), ThresholdTopK(2 / 3))
    assert describe_selections(thresholds) == "threshold top-k 0.333 to 0.667 by layer"

import copy
import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

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
from lightning_dsmoe.routing.routing import Kind

ALL = {"selection": "AllExperts", "renormalize": False}
OWN: Any = print  # any callable may be a selection
PLAN = SelectionPlan(
    TopK(2),
    AllExperts(),
    {
        "blocks.1.feed_forward": Threshold(0.5, renormalize=True),
        "blocks.2.feed_forward": ThresholdTopK(0.48),
        "blocks.1.attention": TopP(0.9),
        "blocks.2.attention": TopK(1, renormalize=True),
    },
)
BLOCKS = {
    "format_version": 1,
    "experts": [{"selection": "TopK", "renormalize": False, "k": k} for k in (2, 1, 2)],
    "attention": [{"selection": "AllExperts", "renormalize": False}] * 3,
}


class Layer(NamedTuple):
    kind: Kind
    n_experts: int


def layers_of(n_experts: int, *blocks: str) -> dict[str, Layer]:
    return {
        f"{block}.{name}": Layer(kind, n_experts)
        for block in blocks
        for name, kind in (("attention", "attention"), ("feed_forward", "experts"))
    }


def data_with(**fields: Any) -> dict[str, Any]:
    return SelectionPlan().to_dict() | fields


def test_defaults_are_dense() -> None:
    assert SelectionPlan() == SelectionPlan(AllExperts(), AllExperts(), {})
    assert hash(SelectionPlan()) == hash(SelectionPlan.of_blocks((AllExperts(),), (AllExperts(),)))


def test_what_blocks_have_in_common_is_the_default() -> None:
    plan = SelectionPlan.of_blocks((TopK(1), TopK(2), TopK(2)), (AllExperts(),) * 3)
    assert plan == SelectionPlan(TopK(2), layers={"blocks.0.feed_forward": TopK(1)})
    found = plan.selections(layers_of(4, "blocks.0", "blocks.1", "blocks.2"))
    assert [found[f"blocks.{b}.feed_forward"] for b in range(3)] == [TopK(1), TopK(2), TopK(2)]


def test_one_plan_fits_a_module_and_its_owner() -> None:
    plan = SelectionPlan(TopK(2), layers={"blocks.1.attention": TopK(1)})
    assert plan.selections(layers_of(4, "blocks.0", "blocks.1"))["blocks.1.attention"] == TopK(1)
    owner = plan.selections(layers_of(4, "model.blocks.0", "model.blocks.1"))
    assert owner["model.blocks.1.attention"] == TopK(1)
    assert owner["model.blocks.0.attention"] == AllExperts()
    whole = SelectionPlan(layers={"model.blocks.1.attention": TopK(1)})
    assert whole.selections(layers_of(4, "blocks.1"))["blocks.1.attention"] == TopK(1)


def test_a_name_is_not_the_end_of_a_word() -> None:
    with pytest.raises(ValueError, match=r"no routed layer 'locks\.0\.attention'; the nearest"):
        SelectionPlan(layers={"locks.0.attention": TopK(1)}).selections(layers_of(4, "blocks.0"))


def test_unknown_names_are_refused_with_the_nearest() -> None:
    plan = SelectionPlan(layers={"blocks.0.mlp": TopK(1)})
    message = r"plan: the model has no routed layer 'blocks\.0\.mlp'; the nearest names are "
    with pytest.raises(ValueError, match=f"{message}blocks"):
        plan.selections(layers_of(4, "blocks.0"))
    with pytest.raises(ValueError, match="and no other"):
        plan.selections({})


def test_names_of_several_layers_are_refused() -> None:
    plan = SelectionPlan(layers={"0.attention": TopK(1)})
    with pytest.raises(ValueError, match=r"'0\.attention' is more than one layer: a\.0.*, b\.0"):
        plan.selections(layers_of(4, "a.0", "b.0"))


def test_two_names_of_one_layer_are_refused() -> None:
    plan = SelectionPlan(layers={"blocks.0.attention": TopK(1), "0.attention": TopK(2)})
    with pytest.raises(ValueError, match=r"'blocks\.0\.attention' and '0\.attention' are both"):
        plan.selections(layers_of(4, "blocks.0"))
    whole = SelectionPlan(layers={f"blocks.{n}.attention": TopK(n + 1) for n in range(2)})
    with pytest.raises(ValueError, match="are both attention"):
        whole.selections({"attention": Layer("attention", 4)})


def test_a_plan_does_not_change() -> None:
    plan = SelectionPlan(layers={"a": TopK(1)})
    with pytest.raises(TypeError):
        plan.layers["a"] = TopK(2)  # type: ignore[index]
    assert copy.deepcopy(plan) == plan
    assert hash(pickle.loads(pickle.dumps(plan))) == hash(plan)


def test_selections_that_do_not_fit_name_the_layer() -> None:
    with pytest.raises(ValueError, match=r"plan, experts, 0\.feed_forward: TopK\(k=5\) needs"):
        SelectionPlan(TopK(5)).selections(layers_of(4, "0"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((TopK(1),) * 3, (TopK(1),) * 3), "one selection for each kind .* got 3 selections"),
        ((TopK,), r"such as TopK\(...\) rather than the class"),
        ((TopK(1), TopK(1), [TopK(1)]), "layers must map names to selections"),
        ((TopK(1), TopK(1), {0: TopK(1)}), "layers must map names to selections"),
        ((TopK(1), TopK(1), {"a": 2}), r"such as TopK\(2\)"),
    ],
    ids=str,
)
def test_other_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SelectionPlan(*arguments)


def test_plans_of_blocks_are_still_read() -> None:
    plan = SelectionPlan(TopK(2), layers={"blocks.1.feed_forward": TopK(1)})
    assert SelectionPlan.from_dict(BLOCKS) == plan
    assert SelectionPlan.from_dict(plan.to_dict()) == plan


def test_pickles_of_blocks_are_still_read() -> None:
    plan = SelectionPlan.__new__(SelectionPlan)
    plan.__setstate__({"experts": (TopK(2), TopK(1)), "attention": (AllExperts(),) * 2})
    assert plan == SelectionPlan.of_blocks((TopK(2), TopK(1)), (AllExperts(),) * 2)
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN


def test_the_old_constructor_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"SelectionPlan\.uniform"):
        assert SelectionPlan.uniform(3, experts=TopK(1)) == SelectionPlan(TopK(1))


def test_json_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "new" / "plan.json")
    assert SelectionPlan.load(tmp_path / "new" / "plan.json") == PLAN
    assert SelectionPlan.from_dict(PLAN.to_dict()) == PLAN


@pytest.mark.parametrize("sizes", [(0, 0), (1, 2), (2, 1)])
def test_lists_of_different_or_no_length_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"got {sizes[0]} and {sizes[1]}"):
        SelectionPlan.of_blocks((TopK(1),) * sizes[0], (TopK(1),) * sizes[1])


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
    blocks = {**BLOCKS, "experts": [selection], "attention": [selection]}
    for data in (data_with(experts=selection), data_with(layers={"a": selection}), blocks):
        file.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"plan\.json: "):
            SelectionPlan.load(file)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param([], id="list"),
        pytest.param({}, id="empty"),
        pytest.param(data_with(extra=1), id="unknown field"),
        pytest.param(data_with(format_version=3), id="newer format"),
        pytest.param(data_with(format_version=True), id="bool format"),
        pytest.param(data_with(experts=[]), id="list for a selection"),
        pytest.param(data_with(layers=[]), id="list for layers"),
        pytest.param(data_with(layers={"a" * 201: ALL}), id="long name"),
        pytest.param(data_with(layers={str(n): ALL for n in range(2049)}), id="too many layers"),
        pytest.param({**BLOCKS, "extra": 1}, id="blocks, unknown field"),
        pytest.param({**BLOCKS, "experts": "TopK"}, id="blocks, text for a list"),
        pytest.param({**BLOCKS, "experts": [ALL] * 1025}, id="blocks, huge list"),
        pytest.param({**BLOCKS, "experts": []}, id="blocks, none"),
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


def test_messages_stay_in_one_line() -> None:
    selection = {"selection": "TopK", "k": 1, "two\nlines": 2}
    with pytest.raises(ValueError, match=r"is not a selection: .* 'two lines'$"):
        SelectionPlan.from_dict(data_with(experts=selection))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": {"selection": "x" * 100_000}}, "is not a selection"),
        ({"format_version": "x" * 100_000}, "this version reads 2"),
    ],
)
def test_messages_stay_short(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SelectionPlan.from_dict(data_with(**change))
    assert len(str(error.value)) < 1_000


def test_plans_in_words() -> None:
    plan = SelectionPlan.of_blocks(
        (TopK(2), TopK(2), TopK(3)), (TopP(0.9), TopP(0.9, renormalize=True), OWN)
    )
    layers = layers_of(4, "blocks.0", "blocks.1", "blocks.2")
    assert describe(plan, layers) == (
        "experts: top 2 to 3 by layer; attention: top-p 0.9 in 1 layer, "
        f"top-p 0.9 renormalized in 1 layer, {OWN} in 1 layer"
    )
    assert describe(plan) == "experts: top 2; attention: top-p 0.9; 3 exceptions"
    assert describe(SelectionPlan()) == "experts: all; attention: all"
    assert describe(SelectionPlan(), {"mlp": Layer("experts", 2)}) == "experts: all"
    thresholds = (ThresholdTopK(1 / 3), ThresholdTopK(2 / 3))
    assert describe_selections(thresholds) == "threshold top-k 0.333 to 0.667 by layer"

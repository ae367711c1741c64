"""A forged configuration or plan of an artifact is refused, and runs no code."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.inference.artifact.directory import read_artifact
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.routing import SelectionPlan, TopK

from ..conftest import sign
from .limits import quickly


def points(**changes: Any) -> dict[str, Any]:
    return SwitchPoints()._asdict() | changes


@pytest.mark.parametrize("name", ["config.json", "plan.json"])
@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} 2', b"\0" * 50, b"1" * 10_000],
    ids=["empty", "open", "latin", "deep", "more", "zeros", "digits"],
)
def test_garbage_for_json(name: str, garbage: bytes, float_artifact: Path) -> None:
    (float_artifact / name).write_bytes(garbage)
    sign(float_artifact)
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        read_artifact(float_artifact)


def test_an_endless_json(float_artifact: Path) -> None:
    with (float_artifact / "plan.json").open("r+b") as file:
        file.truncate(65 * 2**20)
    sign(float_artifact)
    with pytest.raises(ValueError, match=r"plan\.json is larger than 67108864 bytes"):
        read_artifact(float_artifact)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 3, r"has format 3, this version reads 2; a newer version of"),
        ("format_version", 1, "has format 1, this version reads 2; an older"),
        ("format_version", "x" * 999, "has format 'x+[.]{3}x+', this version reads 2"),
        ("format_version", ..., "must be an object with a format_version"),
        ("context", ..., "must have the fields"),
        ("surprise", 1, "must have the fields"),
        ("quantization", "int4", "quantization must be null or int8, got 'int4'"),
        ("quantization", ["int8"], "quantization must be null or int8, got"),
        ("quantize_head", 1, "quantize_head must be true or false"),
        ("quantize_head", ..., "must have the fields"),
        ("switch_points", [8, 9, None], "switch_points must be an object, got"),
        ("switch_points", {"gather_up_to": 8}, "switch_points must have the fields"),
        ("switch_points", points(gather_up_to=-1), "gather_up_to must be an integer .*, got -1"),
        (
            "switch_points",
            points(gather_up_to=True),
            "gather_up_to must be an integer .*, got True",
        ),
        ("switch_points", points(grouped_from=9.0), "grouped_from must be an integer .*, got 9.0"),
        ("switch_points", points(measured_on=3), "measured_on must be null or a string"),
        ("context", 0, "context must be null or an integer from 1 to .*, got 0"),
        ("context", 8.5, r"context must be null or an integer from 1 to .*, got 8\.5"),
        ("tokenizer", "gpt2", "tokenizer must be null or an object, got 'gpt2'"),
        ("architecture", None, "architecture must be an object, got None"),
        ("quantization", "int8", r"missing .*w_in\.scales; .*w_in\.weight is torch\.float32, not"),
        ("quantize_head", True, r"missing head\.rows\.weight; missing head\.rows\.scales$"),
    ],
)
def test_other_configurations(
    field: str, value: object, message: str, float_artifact: Path
) -> None:
    config = json.loads((float_artifact / "config.json").read_text()) | {field: value}
    config = {name: each for name, each in config.items() if each is not ...}
    (float_artifact / "config.json").write_text(json.dumps(config))
    sign(float_artifact)
    with pytest.raises(ValueError, match=message):
        read_artifact(float_artifact)


def test_eight_bit_weights_for_a_float_model(originals: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals["int8"], tmp_path / "artifact"))
    shutil.copy(originals["float"] / "config.json", path)
    sign(path)
    with pytest.raises(
        ValueError, match=r"unknown .*w_in\.scales; .*w_in\.weight is torch\.int8, not"
    ):
        read_artifact(path)


@pytest.mark.parametrize("wrong", ['["os.system"]', "3", "null"])
def test_configurations_that_are_no_objects(wrong: str, float_artifact: Path) -> None:
    for name, message in (("config.json", "must be an object"), ("plan.json", "must be an object")):
        whole = (float_artifact / name).read_text()
        (float_artifact / name).write_text(wrong)
        sign(float_artifact)
        with pytest.raises(ValueError, match=message):
            read_artifact(float_artifact)
        (float_artifact / name).write_text(whole)


def test_a_plan_of_another_model(float_artifact: Path) -> None:
    SelectionPlan(layers={"blocks.2.attention": TopK(1)}).save(float_artifact / "plan.json")
    sign(float_artifact)
    with pytest.raises(ValueError, match=r"no routed layer 'blocks\.2\.attention'"):
        read_artifact(float_artifact)


def test_a_model_of_10_to_the_9_experts_is_refused_before_it_is_built(
    float_artifact: Path,
) -> None:
    config = json.loads((float_artifact / "config.json").read_text())
    config["architecture"]["feed_forward"]["init_args"]["n_experts"] = 10**9
    (float_artifact / "config.json").write_text(json.dumps(config))
    sign(float_artifact)
    with pytest.raises(ValueError, match="n_experts=1000000000 is out of range, 0 to 4096"):
        quickly(lambda: read_artifact(float_artifact))


def test_a_class_of_elsewhere_is_refused(float_artifact: Path) -> None:
    for path in ("os.system", "antigravity.Router"):
        config = json.loads((float_artifact / "config.json").read_text())
        config["architecture"]["feed_forward"]["class_path"] = path
        (float_artifact / "config.json").write_text(json.dumps(config))
        sign(float_artifact)
        with pytest.raises(ValueError, match=f"'{path}' is not a known FeedForwardLayer"):
            read_artifact(float_artifact)
    assert "antigravity" not in sys.modules

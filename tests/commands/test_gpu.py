"""Commands that measure, on a CUDA device and on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Outcome, Run

Words = Callable[[str, str], list[str]]


@pytest.mark.gpu
def test_sweeps_are_the_same(cli: Callable[..., Outcome], measuring: Words, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        outcome = cli(*measuring("sweep", device), f"--device={device}")
        assert outcome.code == 0, outcome.err
        found[device] = json.loads((tmp_path / device / "sweep.json").read_text())
    assert found["cpu"]["identity"] | {"device": "cuda:0"} == found["cuda"]["identity"]
    for name, row in found["cpu"]["plans"].items():
        other = found["cuda"]["plans"][name]["result"]
        assert other["loss"] == pytest.approx(row["result"]["loss"], rel=1e-3)
        assert other["share"] == pytest.approx(row["result"]["share"], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [["--budget=0.7"], ["--budget=0.7", "--fixed=true"]])
def test_plans_are_found(cli: Callable[..., Outcome], measuring: Words, more: list[str]) -> None:
    outcome = cli(*measuring("calibrate", "plan.json"), "--device=cuda", *more)
    assert outcome.code == 0, outcome.err
    assert "On unseen text" in outcome.out


@pytest.mark.gpu
def test_reports_are_written(
    cli: Callable[..., Outcome], measuring: Words, trained: Run, tmp_path: Path
) -> None:
    words = measuring("report", "report.html")
    outcome = cli(*words, "--device=cuda", f"--other={trained.checkpoint}", "--sample=def f(x)")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("device", ["quantum", "meta:x", "cuda:99", "meta"])
def test_devices_that_are_not_there(
    cli: Callable[..., Outcome], measuring: Words, device: str, tmp_path: Path
) -> None:
    outcome = cli(*measuring("sweep", "sweep"), f"--device={device}")
    assert outcome.code == 1
    [error] = outcome.errors
    assert "device must be " in error
    assert f"got '{device}'" in error
    assert not (tmp_path / "sweep").exists()

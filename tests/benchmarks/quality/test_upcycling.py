"""The benchmark of upcycling: a table of results that were not measured, and a run of few steps."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import upcycling
from benchmarks.quality.upcycled import SIZES, Size

TINY = Size(8, 2, 16, n_heads=2, steps=20, n_experts=4, top=(1, 2))


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(SIZES, "tiny", TINY)
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and goes home. " * 400, "utf-8")
    return path


def run(text: Path, model: str, seed: int, test: float, **points: float) -> dict[str, Any]:
    plans = {share: {"plan": "top 1", "test": loss, "share": 0.3} for share, loss in points.items()}
    settings = upcycling.settings(model, "tiny", seed=seed, text=text)
    return {"settings": settings, "test": test, **({"plans": plans} if plans else {})}


@pytest.mark.parametrize(("loss", "verdict"), [(2.009, "met"), (2.011, "missed")])
def test_losses_are_against_the_dense_model_of_the_same_seed(
    text: Path, loss: float, verdict: str
) -> None:
    runs = [
        run(text, upcycling.LONGER, 1, 2.0),
        run(text, upcycling.LONGER, 2, 4.0),
        run(text, "contiguous", 1, 3.0, **{"0.4": 2.02}),
        run(text, "contiguous", 2, 3.0, **{"0.4": 4.04}),
        run(text, "activations", 1, 3.0, **{"0.4": loss}),
        run(text, "activations", 2, 3.0, **{"0.4": 2 * loss}),
    ]
    last = upcycling.table(runs).splitlines()[-1]
    above = loss / 2 - 1
    assert f"40%, activations: {above:+.2%}, aim +0.5%: {verdict}" in last
    assert f"{above - 0.01:+.2%} against contiguous" in last
    assert "25%" not in last


@pytest.mark.slow
def test_runs_of_few_steps(text: Path, tmp_path: Path) -> None:
    runs = []
    for model in (upcycling.DENSE, upcycling.LONGER, "activations"):
        wanted = upcycling.settings(model, "tiny", seed=1, text=text)
        assert upcycling.find(wanted, runs) is None
        runs.append(upcycling.carry_out(wanted, text, tmp_path))
        assert upcycling.find(wanted, runs) is runs[-1]
    dense, longer, mixture = runs
    assert longer["test"] < dense["test"]
    assert 0 < mixture["always"] < mixture["least"] < 1
    for share, point in mixture["plans"].items():
        assert mixture["least"] - 0.01 < point["share"] < float(share) + 0.01
    assert "| activations | 1 |" in upcycling.table(runs)

"""What sparsity costs, as a list."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from .conftest import run


@pytest.fixture
def price_list(benchmark_modules: SimpleNamespace) -> ModuleType:
    module: ModuleType = benchmark_modules.price_list
    return module


def trained(
    models: ModuleType,
    name: str,
    seed: int,
    loss: float,
    points: dict[float, float] | None = None,
    text: str = "ab",
) -> dict[str, Any]:
    configuration = models.configuration(name, models.PRESETS["cpu"], seed=seed, steps=50)
    settings = {"model": name, "seed": seed, "text": text, "configuration": configuration}
    return run(loss, points) | {"settings": settings}


@pytest.fixture
def runs(models: ModuleType) -> list[dict[str, Any]]:
    weak = models.DS_MOE["weak MI"]
    finished = f"{weak}, finished sparsely"
    return [
        trained(models, models.DENSE, 1, 2.0),
        trained(models, models.DENSE, 2, 4.0),
        trained(models, models.DENSE, 3, 9.0, text="cd"),
        trained(models, weak, 1, 2.2, {0.1: 3.0, 0.5: 2.2}),
        trained(models, weak, 2, 4.0, {0.1: 4.004, 0.5: 4.0}),
        trained(models, finished, 3, 1.0, {0.2: 2.0, 0.3: 1.0, 0.4: 1.1, 0.5: 1.0}),
        trained(models, models.ANNEALED, 1, 9.0, {0.1: 9.0}),
    ]


def test_prices_are_means_over_seeds(price_list: ModuleType, runs: list[Any]) -> None:
    plain, finished = price_list.prices(runs)
    assert (plain.weights, plain.steps, plain.finishing) == ((0.01, 0.01), 50, "")
    assert plain.seeds == 2
    assert plain.loss == pytest.approx(3.1)
    assert plain.over_dense == pytest.approx((0.1 + 0.0) / 2)
    first = 0.5 - 0.4 * 0.0022 / 0.8
    assert plain.safe_share == pytest.approx((first + 0.1) / 2)
    assert plain.losses == pytest.approx(
        [(3.0 - 0.8 * 0.05 / 0.4 + 4.0035) / 2, (3.0 - 0.8 * 0.15 / 0.4 + 4.0025) / 2]
    )
    assert (finished.finishing, finished.over_dense) == ("threshold 0.3", None)
    assert finished.safe_share == pytest.approx(0.5 - 0.1 * 0.001 / 0.1)
    assert math.isnan(finished.losses[0])


def test_every_way_of_finishing_has_the_same_dense_twin(
    price_list: ModuleType, models: ModuleType
) -> None:
    dense = trained(models, models.DENSE, 1, 2.0)
    for name in models.FINISHED:
        [price] = price_list.prices([dense, trained(models, name, 1, 2.2, {0.1: 3.0, 0.5: 2.2})])
        assert price.over_dense == pytest.approx(0.1), name


def test_fixed_numbers_count_where_they_are_better(
    price_list: ModuleType, models: ModuleType
) -> None:
    known = trained(models, models.DS_MOE["weak MI"], 1, 2.0, {0.1: 4.0, 0.2: 2.0})
    numbers = [{"rule": "top-k", "share": s, "loss": x} for s, x in ((0.14, 2.5), (0.18, 2.3))]
    known["points"] += numbers
    found = [price_list.lowest_loss(known, share) for share in (0.05, 0.13, 0.14, 0.18, 0.2)]
    assert found == pytest.approx([math.nan, 3.4, 2.5, 2.3, 2.0], nan_ok=True)
    rising = trained(models, models.DS_MOE["weak MI"], 1, 2.0, {0.1: 1.0, 0.2: 2.0})
    assert price_list.lowest_loss(rising, 0.15) == 1.0


def test_the_same_run_twice_is_a_mistake(
    price_list: ModuleType, models: ModuleType, runs: list[Any]
) -> None:
    again = trained(models, models.DENSE, 2, 4.1)
    with pytest.raises(ValueError, match="two runs of dense with seed 2; keep one"):
        price_list.prices([*runs, again])


def test_it_prints_and_draws(
    price_list: ModuleType,
    runs: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    words = ["--json", "runs.json", "--output", "prices.md", "--picture", "prices.svg"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["price_list.py", *words])
    price_list.main()
    written = (tmp_path / "prices.md").read_text()
    assert written == capsys.readouterr().out
    assert "| 50 | 0.01 / 0.01 |  | 2 | 3.1000 | +5.00% |" in written
    assert "| threshold 0.3 | 1 | 1.0000 |  |" in written
    assert "</svg>" in (tmp_path / "prices.svg").read_text()


def test_without_ds_moe_there_is_no_list(
    price_list: ModuleType,
    runs: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "runs.json").write_text(json.dumps(runs[:2]))
    monkeypatch.setattr(sys, "argv", ["price_list.py", "--json", str(tmp_path / "runs.json")])
    with pytest.raises(SystemExit, match="none of the runs is of DS-MoE under constant MI"):
        price_list.main()

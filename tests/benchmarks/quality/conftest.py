import copy
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.quality import (
    calibration,
    comparisons,
    frontier,
    price_list,
    report,
    reproduce,
    runs,
)
from benchmarks.quality import claims as claims_module
from benchmarks.quality import models as models_module


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return SimpleNamespace(
        calibration=calibration,
        claims=claims_module,
        comparisons=comparisons,
        frontier=frontier,
        models=models_module,
        price_list=price_list,
        report=report,
        reproduce=reproduce,
        runs=runs,
    )


@pytest.fixture
def models(benchmark_modules: SimpleNamespace) -> ModuleType:
    module: ModuleType = benchmark_modules.models
    return module


@pytest.fixture
def claims(benchmark_modules: SimpleNamespace) -> ModuleType:
    module: ModuleType = benchmark_modules.claims
    return module


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

"""The comparison on digits, on results that were not measured, and one run of a few steps."""

from typing import Any

import pytest

from benchmarks.quality import digits


def dense(seed: int, fold: int, images: int, right: int) -> dict[str, Any]:
    settings = digits.settings(digits.DENSE, seed=seed, fold=fold, steps=1)
    found = {"all experts": {"correct": right, "active": 1.0}}
    return {"settings": settings, "images": images, "found": found}


def ds_moe(
    seed: int, fold: int, images: int, right: int, sparse: int, active: float = 0.2
) -> dict[str, Any]:
    settings = digits.settings(digits.DS_MOE, seed=seed, fold=fold, steps=1)
    under_the_plan = {"correct": sparse, "active": active}
    found = {"all experts": {"correct": right, "active": 1.0}, "plan": under_the_plan}
    return {"settings": settings, "images": images, "found": found}


def runs(sparse: int, active: float) -> list[dict[str, Any]]:
    return [
        dense(1, 0, 100, 90),
        dense(1, 1, 200, 180),
        dense(2, 0, 100, 93),
        ds_moe(1, 0, 100, 80, 90),
        ds_moe(1, 1, 200, 160, 180),
        ds_moe(2, 0, 100, 80, sparse, active),
    ]


def test_images_of_all_folds_count_alike() -> None:
    twin, every, sparse = digits.accuracies(runs(92, 0.5))
    assert twin.by_seed == {1: 90.0, 2: 93.0}
    assert every.by_seed == {1: 80.0, 2: 80.0}
    assert sparse.by_seed == {1: 90.0, 2: 92.0}
    assert sparse.active == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("right", "active", "verdict"),
    [(93, 0.5, "met"), (92, 0.5, "missed"), (93, 0.8, "missed"), (99, 0.5, "met")],
)
def test_verdict(right: int, active: float, verdict: str) -> None:
    assert digits.table(digits.accuracies(runs(right, active))).endswith(f": {verdict}.")


def test_runs_are_found_by_their_settings() -> None:
    every = runs(90, 0.2)
    assert digits.find(digits.settings(digits.DENSE, seed=1, fold=1, steps=1), every) is every[1]
    assert digits.find(digits.settings(digits.DENSE, seed=1, fold=1, steps=2), every) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("model", [digits.DENSE, digits.DS_MOE])
def test_a_run(model: str) -> None:
    wanted = digits.settings(model, seed=7, fold=4, steps=4)
    found = digits.carry_out(wanted)
    assert found["settings"] == wanted
    assert found["images"] == 359
    assert digits.carry_out(wanted)["found"] == found["found"]
    shares = {name: each["active"] for name, each in found["found"].items()}
    assert shares.pop("all experts") == 1.0
    assert all(0.3 < share < 0.35 for share in shares.values())
    assert len(shares) == (model == digits.DS_MOE)

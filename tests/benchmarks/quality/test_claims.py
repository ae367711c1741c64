"""How the paper's claims are judged and shown."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from .conftest import run, sparse


def verdicts(claims: ModuleType, runs: Any) -> list[str]:
    """Verdicts by the first letters of the claims, and the figures they can be seen from."""
    return [claim.verdict for claim in claims.judge(runs)]


def test_all_claims_can_hold(claims: ModuleType, all_hold: Any) -> None:
    assert set(verdicts(claims, all_hold)) == {"holds"}


@pytest.mark.parametrize(
    ("model", "change", "claim"),
    [
        ("DENSE", lambda r: r["points"][0].update(loss=1.95), "1. With 30%"),
        ("DENSE", lambda r: r["points"][0].update(loss=1.9), "1. With 40%"),
        (
            "SAME_TOTAL",
            lambda r: r["points"][1].update(loss=1.9),
            "2. DS-MoE is better than a sparsely",
        ),
        ("TOP_1", lambda r: r["points"][1].update(loss=2.9), "2. The same against one trained"),
        ("SAME_ACTIVE", lambda r: r["points"][1].update(loss=1.9), "2. DS-MoE is as good"),
        (
            "SMALL_DENSE",
            lambda r: r["points"][0].update(loss=1.9),
            "2. DS-MoE is better than a dense",
        ),
        ("weak MI", lambda r: r["running"]["experts"].update(beyond_one=0.4), "3."),
        ("middle MI", lambda r: r["running"]["experts"].update(share=0.6), "3."),
        ("strong MI", lambda r: r["points"][2].update(loss=2.3), "4."),
        ("weak MI", lambda r: r["points"][4].update(loss=2.0), "5."),
    ],
)
def test_each_claim_can_fail_and_be_unclear(
    claims: ModuleType,
    models: ModuleType,
    all_hold: Any,
    model: str,
    change: Callable[[dict[str, Any]], None],
    claim: str,
) -> None:
    runs = all_hold[models.DS_MOE.get(model) or getattr(models, model)]
    for seed, expected in ((1, "unclear"), (2, "fails")):
        change(runs[seed])
        judged = {c.claim: c.verdict for c in claims.judge(all_hold)}
        assert next(v for name, v in judged.items() if name.startswith(claim)) == expected


def test_one_seed_or_none_proves_nothing(claims: ModuleType, all_hold: Any) -> None:
    for by_seed in all_hold.values():
        del by_seed[2]
    assert set(verdicts(claims, all_hold)) == {"unclear"}
    assert set(verdicts(claims, {})) == {"unclear"}


def test_losses_between_plans_lie_on_a_line(benchmark_modules: SimpleNamespace) -> None:
    loss_at = benchmark_modules.comparisons.loss_at
    measured = run(1.0, {0.5: 2.0, 0.25: 4.0})
    assert [loss_at(measured, share) for share in (0.25, 0.375, 0.5, 0.75, 1.0, 1.2)] == [
        *(4.0, 3.0, 2.0, 1.5, 1.0, 1.0)
    ]
    assert loss_at(measured, 0.25 - 1e-6) == 4.0
    assert loss_at(measured, 0.2) is None


def test_models_meet_at_the_same_number_of_parameters(
    benchmark_modules: SimpleNamespace, models: ModuleType
) -> None:
    """Half of 1,500 parameters are those that three quarters of 1,000 are."""
    own = run(1.0, {0.5: 3.0})
    runs = {models.DS_MOE["weak MI"]: {1: own}, "other": {1: sparse(0.5, 1.6, hidden=1500)}}
    found = benchmark_modules.comparisons.against(runs, "other")
    assert found.differences == {1: pytest.approx(2.0 / 1.6 - 1)}


def test_report_shows_every_claim_and_run(
    benchmark_modules: SimpleNamespace, claims: ModuleType, all_hold: Any, tmp_path: Path
) -> None:
    report = benchmark_modules.report
    all_hold["dense"][2]["points"][0]["loss"] = 1.995
    shown = report.tables(all_hold, [0.2, 0.4])
    assert "**1.9975** (1.9950 to 2.0000)" in shown
    for name in [*all_hold, *(claim.claim for claim in claims.judge(all_hold))]:
        assert f"| {name}" in shown
    report.figure(all_hold, [0.2, 0.4], tmp_path / "frontiers.svg")
    assert "<svg" in (tmp_path / "frontiers.svg").read_text()


# Runs in processes, and those that are there already

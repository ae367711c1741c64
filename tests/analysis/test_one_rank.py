"""Measures that one of several ranks makes while the others do something else."""

from typing import Any

import pytest
from torchmetrics import MeanMetric

from lightning_dsmoe.analysis import HeldOut, evaluate_plan
from lightning_dsmoe.analysis.certificate.judgement import judge
from lightning_dsmoe.analysis.report.lift import frequent_tokens
from lightning_dsmoe.analysis.report.utilization import utilization
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.metrics import ParameterCounts
from lightning_dsmoe.routing import SelectionPlan, TopK

PLAN = SelectionPlan(experts=TopK(2))


@pytest.fixture(autouse=True)
def several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let metrics find several ranks; without a process group, synchronising is an error."""
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)


def test_nothing_is_synchronised(
    decoder: Decoder, model: SparseModel, text: HeldOut, counts: ParameterCounts
) -> None:
    judged: Any = judge(model, text, decoder)
    evaluated = evaluate_plan(model, PLAN, text, counts)
    use = utilization(model, PLAN, text, counts, frequent_tokens(text, 3))
    assert judged.active_share_mean == 1
    assert evaluated.active_share_mean == pytest.approx(use.active.mean.item())
    mean = MeanMetric()
    mean.update(1.0)
    with pytest.raises(ValueError, match="process group"):
        mean.compute()

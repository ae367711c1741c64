"""Scopes that close in another order than the reverse of that in which they opened."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.routing import (
    SelectionPlan,
    TopK,
    interception,
    record_routings,
    run_plan,
)
from lightning_dsmoe.routing.running import running_plan


def open_plan(model: nn.Module) -> SelectionPlan | None:
    own = SelectionPlan()
    found = running_plan(model, own)
    return None if found is own else found


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleList([MixtureOfExperts(4, 3, 2)])


def test_what_was_opened_first_may_end_first(model: nn.Module) -> None:
    """As callbacks do, whose hooks run in one order at the begin and at the end of a batch."""
    first, second = ExitStack(), ExitStack()
    plan = SelectionPlan(experts=TopK(1))
    record = first.enter_context(record_routings(model))
    second.enter_context(run_plan(model, plan))
    model[0](torch.randn(5, 4))
    first.close()
    assert open_plan(model) == plan
    model[0](torch.randn(2, 4))
    second.close()
    assert not interception.is_open
    assert interception.scope().parts == ()
    with record_routings(model) as other:
        model[0](torch.randn(3, 4))
    assert record.active_masks()["0"].sum(-1).tolist() == [1] * 5
    assert other.active_masks()["0"].sum(-1).tolist() == [3] * 3


def test_of_plans_the_last_holds_whichever_ends(model: nn.Module) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(run_plan(model, SelectionPlan(experts=TopK(1))))
    second.enter_context(run_plan(model, SelectionPlan(experts=TopK(2))))
    first.close()
    assert open_plan(model) == SelectionPlan(experts=TopK(2))
    second.close()
    assert open_plan(model) is None


def test_set_aside(model: nn.Module) -> None:
    with run_plan(model, SelectionPlan(experts=TopK(1))), record_routings(model) as record:
        with interception.set_aside():
            assert open_plan(model) is None
            with record_routings(model) as inner:
                model[0](torch.randn(2, 4))
        model[0](torch.randn(3, 4))
    assert inner.active_masks()["0"].sum(-1).tolist() == [3] * 2
    assert record.active_masks()["0"].sum(-1).tolist() == [1] * 3
    assert open_plan(model) is None

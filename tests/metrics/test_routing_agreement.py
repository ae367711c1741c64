import pytest
import torch
from torch import Tensor

from lightning_dsmoe import SelectionPlan, Threshold, TopK
from lightning_dsmoe.decoder import Routings
from lightning_dsmoe.metrics import routing_agreement
from lightning_dsmoe.routing import Routing

PLAN = SelectionPlan.of_blocks((TopK(1), TopK(1)), (Threshold(1.5), TopK(1)))
UNIFORM = SelectionPlan(experts=TopK(1), attention=TopK(1))


def routing(*best: int) -> Routing:
    logits = 3.0 * torch.eye(3)[list(best)][None]
    return Routing(logits, logits.softmax(-1))


@pytest.fixture
def mask() -> Tensor:
    return torch.tensor([[True, True, True, False]])


def test_counts_choices_of_tokens_that_count(mask: Tensor) -> None:
    found = Routings((routing(0, 1, 2, 0), None), (routing(1, 1, 1, 1), routing(2, 2, 2, 2)))
    other = Routings((routing(0, 2, 2, 1), None), (routing(1, 1, 0, 1), routing(2, 2, 2, 0)))
    assert routing_agreement(found, found, PLAN, mask).item() == 1
    assert routing_agreement(found, other, PLAN, mask).item() == pytest.approx(7 / 9)


def test_other_gates_of_the_same_experts_agree(mask: Tensor) -> None:
    logits = torch.randn(1, 4, 3)
    sharper = Routings((None, None), (None, Routing(2 * logits, (2 * logits).softmax(-1))))
    found = Routings((None, None), (None, Routing(logits, logits.softmax(-1))))
    assert routing_agreement(found, sharper, PLAN, mask).item() == 1


def test_without_routers_there_is_nothing_to_disagree_on(mask: Tensor) -> None:
    nothing = Routings((None, None), (None, None))
    assert routing_agreement(nothing, nothing, UNIFORM, mask).item() == 1


def test_without_tokens_there_is_nothing_to_disagree_on(mask: Tensor) -> None:
    found = Routings((routing(0, 1, 2, 0), None), (None, None))
    other = Routings((routing(1, 2, 0, 1), None), (None, None))
    assert routing_agreement(found, other, UNIFORM, mask & False).item() == 1


def test_old_names_of_arguments(mask: Tensor) -> None:
    routings = Routings((routing(0, 1, 2, 0), None), (None, None))
    with pytest.warns(DeprecationWarning, match="routing_agreement") as caught:
        agreement = routing_agreement(found=routings, expected=routings, plan=UNIFORM, mask=mask)  # type: ignore[call-arg]
    assert agreement == 1
    assert sorted(str(each.message).partition(";")[0] for each in caught) == [
        "routing_agreement(expected=) is now other_routings=",
        "routing_agreement(found=) is now routings=",
    ]

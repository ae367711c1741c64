"""Selections among the experts that remain."""

import pytest
import torch

from lightning_dsmoe.routing import AllExperts, Routing, Selection, Threshold, TopK, TopP
from lightning_dsmoe.routing.removed import remaining_mask, running_mask, select

from .among import SELECTIONS, Among


@pytest.fixture(params=[2, 40], ids=["few tokens", "many tokens"])
def routing(request: pytest.FixtureRequest) -> Routing:
    logits = 1.5 * torch.randn(2, request.param, 6)
    logits[0, 0] = 0.0  # all equal
    return Routing(logits, logits.softmax(-1))


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("remaining", [[1, 2, 5], [3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
def test_the_best_of_those_that_remain(
    selection: Selection, remaining: list[int], routing: Routing
) -> None:
    numbers = torch.tensor(remaining)
    found = select(selection, routing, numbers)
    expected = Among(selection, remaining)(routing.probs)
    assert torch.equal(found.active, expected.active[..., numbers])
    torch.testing.assert_close(found.weight, expected.weight[..., numbers], rtol=1e-6, atol=0)
    assert torch.equal(remaining_mask(selection, routing, numbers), found.active)
    assert torch.equal(running_mask(selection, routing, numbers), expected.active)
    assert found.active.any(-1).all()


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_nothing_was_removed(selection: Selection, routing: Routing) -> None:
    expected = selection(routing.probs)
    found = select(selection, routing, None)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(remaining_mask(selection, routing, None), expected.active)


@pytest.mark.parametrize(
    "selection", [TopK(2), Threshold(0.7), TopP(0.7), TopK(2, renormalize=True)], ids=str
)
def test_nothing_changes_without_experts_that_no_token_chose(
    selection: Selection, routing: Routing
) -> None:
    logits = routing.logits.clone()
    logits[..., [0, 4]] -= 20
    routing = Routing(logits, logits.softmax(-1))
    expected = selection(routing.probs)
    numbers = torch.tensor([1, 2, 3, 5])
    found = select(selection, routing, numbers)
    assert not expected.active[..., [0, 4]].any()
    assert torch.equal(found.active, expected.active[..., numbers])
    torch.testing.assert_close(found.weight, expected.weight[..., numbers], rtol=2e-7, atol=0)
    if not selection.renormalize:
        assert torch.equal(found.weight, expected.weight[..., numbers])


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_a_removed_expert_with_all_the_probability(selection: Selection) -> None:
    logits = torch.tensor([[300.0, 0.0, -1.0, -2.0]])
    gates, active = select(selection, Routing(logits, logits.softmax(-1)), torch.tensor([1, 2, 3]))
    assert gates.isfinite().all()
    assert active.any()
    total = gates.sum().item()
    assert total == pytest.approx(1.0 if selection.renormalize else 0.0)
    if not isinstance(selection, AllExperts):
        assert active[0, 0]

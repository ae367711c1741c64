import pytest
import torch
from torch import Tensor

from lightning_dsmoe.decoder import Routings
from lightning_dsmoe.losses import load_balancing_loss, mutual_information_loss, router_z_loss
from lightning_dsmoe.routing import Routing, SelectionPlan, TopK
from lightning_dsmoe.training.routing_losses import RoutingLossWeights, routing_losses

NONE = RoutingLossWeights(0.0, 0.0)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
PLAN = SelectionPlan((TopK(2), TopK(1)), (TopK(1), TopK(2)))
KINDS = ("experts", "attention")


def routing(n_experts: int, *, scale: float = 2.0) -> Routing:
    logits = (scale * torch.randn(2, 5, n_experts)).requires_grad_()
    return Routing(logits, logits.softmax(-1))


@pytest.fixture
def routings() -> Routings:
    return Routings((routing(4), routing(4)), (routing(3), routing(3)))


def summed(routings: Routings, name: str) -> Tensor:
    """One loss, added up over the routers of one or both kinds."""
    total = torch.zeros(())
    for kind, selections in zip(routings, (PLAN.experts, PLAN.attention), strict=True):
        for found, selection in zip(kind, selections, strict=True):
            assert found is not None
            if name == "load_balancing":
                active = selection.mask(found.probs)
                total = total + load_balancing_loss(found.probs, active, MASK)
            elif name == "router_z":
                total = total + router_z_loss(found.logits, MASK)
            elif (name == "expert_mi") == (kind is routings.experts):
                total = total + mutual_information_loss(found.probs, MASK)
    return total


@pytest.mark.parametrize("name", RoutingLossWeights._fields)
def test_each_weight_scales_the_sum_over_its_routers(routings: Routings, name: str) -> None:
    weights = NONE._replace(**{name: 0.3})
    total = routing_losses(routings, PLAN, weights, MASK).total
    torch.testing.assert_close(total, 0.3 * summed(routings, name))
    total.backward()
    for kind, found in zip(KINDS, routings, strict=True):
        concerned = name not in ("expert_mi", "attention_mi") or name[:6] == kind[:6]
        for part in found:
            assert part is not None
            assert part.logits.grad is not None
            assert part.logits.grad.any() == concerned


def test_weights_add_up(routings: Routings) -> None:
    weights = RoutingLossWeights(0.1, 0.2, 0.3, 0.4)
    total = routing_losses(routings, PLAN, weights, MASK).total
    expected = sum(weight * summed(routings, name) for name, weight in weights._asdict().items())
    torch.testing.assert_close(total, expected)


def test_terms_are_means_over_routers_without_a_graph(routings: Routings) -> None:
    terms = routing_losses(routings, PLAN, RoutingLossWeights(0.1, 0.2, 0.3, 0.4), MASK).terms
    assert list(terms) == [
        f"{kind}/{term}"
        for kind in KINDS
        for term in ("mutual_information", "entropy", "balance_entropy")
    ]
    assert not any(term.requires_grad for term in terms.values())
    for kind, name in zip(KINDS, ("expert_mi", "attention_mi"), strict=True):
        information = terms[f"{kind}/mutual_information"]
        torch.testing.assert_close(information, -summed(routings, name).detach() / 2)
        parts = terms[f"{kind}/balance_entropy"] - terms[f"{kind}/entropy"]
        torch.testing.assert_close(information, parts)


def test_terms_do_not_depend_on_weights(routings: Routings) -> None:
    weighted = routing_losses(routings, PLAN, RoutingLossWeights(0.1, 0.2, 0.3, 0.4), MASK).terms
    for name, term in routing_losses(routings, PLAN, NONE, MASK).terms.items():
        assert torch.equal(weighted[name], term)


def test_tokens_that_do_not_count_change_nothing(routings: Routings) -> None:
    weights = RoutingLossWeights(0.1, 0.2, 0.3, 0.4)
    total = routing_losses(routings, PLAN, weights, MASK).total
    total.backward()
    for found in (*routings.experts, *routings.attention):
        assert found is not None
        assert found.logits.grad is not None
        assert not found.logits.grad[~MASK].any()
        assert found.logits.grad[MASK].any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_routers_is_left_out(routings: Routings, kind: str) -> None:
    weights = RoutingLossWeights(0.1, 0.2)
    left = routings._replace(**{kind: (None, None)})
    losses = routing_losses(left, PLAN, weights, MASK)
    other = "attention_mi" if kind == "experts" else "expert_mi"
    torch.testing.assert_close(losses.total, getattr(weights, other) * summed(routings, other))
    assert not any(name.startswith(kind) for name in losses.terms)
    assert len(losses.terms) == 3


def test_layers_without_a_router_count_in_no_mean(routings: Routings) -> None:
    left = routings._replace(experts=(None, routings.experts[1]))
    found = routing_losses(left, PLAN, RoutingLossWeights(1.0, 0.0), MASK)
    assert left.experts[1] is not None
    expected = mutual_information_loss(left.experts[1].probs, MASK)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.terms["experts/mutual_information"], -expected.detach())


def test_no_router_at_all_costs_nothing() -> None:
    losses = routing_losses(
        Routings((None, None), (None, None)), PLAN, RoutingLossWeights(1.0, 1.0), MASK
    )
    assert losses.total.item() == 0
    assert losses.terms == {}


def test_a_plan_of_other_layers_is_refused(routings: Routings) -> None:
    with pytest.raises(ValueError, match="zip"):
        routing_losses(routings, SelectionPlan.uniform(3), NONE, MASK)

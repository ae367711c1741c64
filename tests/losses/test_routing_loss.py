"""The sum over routers, against the loss of each router by itself."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe import MixtureOfExperts, RoutingLoss, record_routings, run_plan
from lightning_dsmoe.losses import load_balancing_loss, mutual_information_loss, router_z_loss
from lightning_dsmoe.routing import LinearRouter, Routing, Routings, SelectionPlan, TopK
from lightning_dsmoe.routing.running import RoutingRecord

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
PLAN = SelectionPlan.of_blocks((TopK(2), TopK(1)), (TopK(1), TopK(2)))
KINDS = ("experts", "attention")
WEIGHTS = ("expert_mi", "attention_mi", "load_balancing", "router_z")


def only(**weights: float) -> RoutingLoss:
    return RoutingLoss(**{**dict.fromkeys(WEIGHTS, 0.0), **weights})


def routing(n_experts: int, *, scale: float = 2.0) -> Routing:
    logits = (scale * torch.randn(2, 5, n_experts)).requires_grad_()
    return Routing(logits, logits.softmax(-1))


@pytest.fixture
def routings() -> Routings:
    torch.manual_seed(0)
    return Routings((routing(4), routing(4)), (routing(3), routing(3)))


def each(routings: Routings) -> Iterator[tuple[str, Routing, Tensor]]:
    """Kind, routing and running experts of each router."""
    selections = PLAN.selections(routings.by_name())
    for name, (kind, found) in routings.by_name().items():
        yield kind, found, selections[name].mask(found.probs)


def summed(routings: Routings, name: str) -> Tensor:
    """One loss, added up over the routers of one or both kinds."""
    total = torch.zeros(())
    for kind, found, active in each(routings):
        if name == "load_balancing":
            total = total + load_balancing_loss(found.probs, active, MASK)
        elif name == "router_z":
            total = total + router_z_loss(found.logits, MASK)
        elif (name == "expert_mi") == (kind == "experts"):
            total = total + mutual_information_loss(found.probs, MASK)
    return total


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weight_scales_the_sum_over_its_routers(routings: Routings, name: str) -> None:
    total = only(**{name: 0.3})(routings, MASK, plan=PLAN)
    torch.testing.assert_close(total, 0.3 * summed(routings, name))
    inputs = [found.logits for _, found, _ in each(routings)]
    expected, found = (
        torch.autograd.grad(
            loss, inputs, allow_unused=True, materialize_grads=True, retain_graph=True
        )
        for loss in (0.3 * summed(routings, name), total)
    )
    torch.testing.assert_close(found, expected)
    assert any(gradient.any() for gradient in found)


def test_weights_add_up_and_may_be_set_later(routings: Routings) -> None:
    loss = RoutingLoss(0.1, 0.2, 0.3, 0.4)
    for weights in ((0.1, 0.2, 0.3, 0.4), (0.5, 0.2, 0.3, 0.0)):
        expected = sum(w * summed(routings, n) for n, w in zip(WEIGHTS, weights, strict=True))
        torch.testing.assert_close(loss(routings, MASK, plan=PLAN), expected)
        loss.expert_mi, loss.router_z = 0.5, 0.0


def test_terms_are_means_over_routers_without_a_graph(routings: Routings) -> None:
    terms = RoutingLoss(0.1, 0.2, 0.3, 0.4).losses(routings, MASK, plan=PLAN).terms
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
    for name, term in only().losses(routings, MASK, plan=PLAN).terms.items():
        assert torch.equal(terms[name], term)


def test_tokens_that_do_not_count_change_nothing(routings: Routings) -> None:
    RoutingLoss(0.1, 0.2, 0.3, 0.4)(routings, MASK, plan=PLAN).backward()
    for _, found, _ in each(routings):
        assert found.logits.grad is not None
        assert not found.logits.grad[~MASK].any()
        assert found.logits.grad[MASK].any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_routers_is_left_out(routings: Routings, kind: str) -> None:
    left = routings._replace(**{kind: (None, None)})
    losses = RoutingLoss(0.1, 0.2).losses(left, MASK)
    other, weight = ("attention_mi", 0.2) if kind == "experts" else ("expert_mi", 0.1)
    torch.testing.assert_close(losses.total, weight * summed(routings, other))
    assert not any(name.startswith(kind) for name in losses.terms)
    assert len(losses.terms) == 3


def test_layers_without_a_router_count_in_no_mean(routings: Routings) -> None:
    left = routings._replace(experts=(None, routings.experts[1]))
    found = RoutingLoss(1.0, 0.0).losses(left, MASK)
    assert left.experts[1] is not None
    expected = mutual_information_loss(left.experts[1].probs, MASK)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.terms["experts/mutual_information"], -expected.detach())


def test_no_router_at_all_costs_nothing() -> None:
    losses = RoutingLoss(1.0, 1.0).losses(Routings((None, None), (None, None)), MASK)
    assert losses.total.item() == 0
    assert losses.terms == {}


def test_a_plan_of_other_layers_is_refused(routings: Routings) -> None:
    other = SelectionPlan(layers={"blocks.2.feed_forward": TopK(1)})
    with pytest.raises(ValueError, match=r"no routed layer 'blocks\.2\.feed_forward'"):
        only()(routings, MASK, plan=other)


@pytest.fixture
def model() -> nn.ModuleDict:
    torch.manual_seed(1)
    wide = MixtureOfExperts(4, 5, 2, router=LinearRouter)
    return nn.ModuleDict({name: MixtureOfExperts(4, 3, 2) for name in "ab"} | {"wide": wide})


def recorded(model: nn.ModuleDict, x: Tensor, plan: SelectionPlan) -> RoutingRecord:
    """A record of one layer that runs twice, on one that runs once, and on fewer tokens."""
    with run_plan(model, plan), record_routings(model) as record:
        model["a"](x)
        model["a"](2 * x)
        model["b"](x)
        model["wide"](x[:, :2])
    return record


def test_a_record_is_the_sum_over_its_layers(model: nn.ModuleDict) -> None:
    """Whatever they were called with, and under the plan that they ran with."""
    x = torch.randn(2, 5, 4)
    plan = SelectionPlan(experts=TopK(1), layers={"b": TopK(2)})
    weights = {"expert_mi": 0.1, "load_balancing": 0.3, "router_z": 0.4}
    total = only(**weights)(recorded(model, x, plan))
    expected = torch.zeros(())
    for name, inputs in (("a", torch.cat([x, 2 * x])), ("b", x), ("wide", x[:, :2])):
        logits, probs = model[name].router(inputs)
        active = TopK(2 if name == "b" else 1).mask(probs)
        expected = expected + 0.1 * mutual_information_loss(probs)
        expected = expected + 0.3 * load_balancing_loss(probs, active)
        expected = expected + 0.4 * router_z_loss(logits)
    torch.testing.assert_close(total, expected)
    parameters = list(model.parameters())
    found, wanted = (
        torch.autograd.grad(each, parameters, allow_unused=True, materialize_grads=True)
        for each in (total, expected)
    )
    torch.testing.assert_close(found, wanted)


def test_a_mask_of_the_record_or_of_the_call(model: nn.ModuleDict) -> None:
    x = torch.randn(2, 5, 4)
    with record_routings(model, MASK) as record:
        model["a"](x)
        model["a"](2 * x)
    loss = only(expert_mi=1.0)
    probs = torch.cat([model["a"].router(each).probs for each in (x, 2 * x)])
    expected = mutual_information_loss(probs, torch.cat([MASK, MASK]))
    torch.testing.assert_close(loss(record), expected)
    assert not torch.equal(loss(record, ~MASK), expected)
    with pytest.raises(ValueError, match=r"a mask of shape \(5,\), but a has tokens of shape"):
        loss(record, MASK[0])


def test_a_record_without_gradients_cannot_train(model: nn.ModuleDict) -> None:
    with torch.no_grad(), record_routings(model) as record:
        model["a"](torch.randn(3, 4))
    loss = RoutingLoss()
    with pytest.raises(RuntimeError, match="the routing of a was recorded without gradients"):
        loss(record)
    assert loss.eval()(record) < 0
    with torch.no_grad():
        assert loss.train()(record) < 0


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", WEIGHTS)
def test_impossible_weights(name: str, weight: float) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        RoutingLoss(**{name: weight})


def test_it_says_its_weights_and_has_no_state() -> None:
    loss = RoutingLoss(0.1, 0.2, 0.3, 0.4)
    assert "expert_mi=0.1, attention_mi=0.2, load_balancing=0.3, router_z=0.4" in repr(loss)
    assert loss.state_dict() == {}


def test_the_information_of_each_router_where_it_is_asked_for() -> None:
    """Two routers that have collapsed on different experts, and two that have not, in two sizes."""
    torch.manual_seed(0)
    probs = [torch.rand(2, 5, n).softmax(-1) for n in (4, 3, 4)]
    probs[0] = torch.nn.functional.one_hot(torch.zeros(2, 5, dtype=torch.long), 4).float()
    mask = torch.rand(2, 5) > 0.3
    experts = tuple(Routing(p.log(), p) for p in probs)
    routings = Routings(experts, (experts[0], None, experts[1]))
    loss = RoutingLoss()
    plain, told = loss.losses(routings, mask), loss.losses(routings, mask, by_layer=True)
    assert torch.equal(plain.total, told.total)
    more = {name: value for name, value in told.terms.items() if name not in plain.terms}
    expected = {f"experts/layer_{n:02d}": probs[n] for n in range(3)}
    expected |= {"attention/layer_00": probs[0], "attention/layer_02": probs[1]}
    assert more.keys() == {f"{name}/mutual_information" for name in expected}
    for name, each in expected.items():
        value = more[f"{name}/mutual_information"]
        torch.testing.assert_close(value, -mutual_information_loss(each, mask))
    of_experts = [more[f"experts/layer_{n:02d}/mutual_information"] for n in range(3)]
    mean = told.terms["experts/mutual_information"]
    torch.testing.assert_close(torch.stack(of_experts).mean(), mean)

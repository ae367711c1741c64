"""How a model uses its experts, against loops over single tokens."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.analysis import HeldOut, evaluate_plan
from lightning_dsmoe.analysis.report.drift import drift
from lightning_dsmoe.analysis.report.lift import (
    FrequentTokens,
    frequent_tokens,
    over_represented,
    strongest_pairs,
)
from lightning_dsmoe.analysis.report.sample_routing import sample_routing
from lightning_dsmoe.analysis.report.utilization import (
    ModelUse,
    RouterUse,
    check_mixtures,
    utilization,
)
from lightning_dsmoe.attention import GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts
from lightning_dsmoe.inference import SparseModel, SwitchPoints, compile_sparse
from lightning_dsmoe.metrics import (
    ParameterCounts,
    RoutedParameters,
    count_parameters,
    expert_utilization,
)
from lightning_dsmoe.routing import AllExperts, SelectionPlan, Threshold, TopK, routed_layers

PLAN = SelectionPlan.of_blocks((TopK(2), Threshold(0.9)), (TopK(1), Threshold(0.8)))
LEAST = 5


@pytest.fixture
def frequent(text: HeldOut) -> FrequentTokens:
    return frequent_tokens(text, LEAST)


@pytest.fixture
def use(
    model: SparseModel, text: HeldOut, counts: ParameterCounts, frequent: FrequentTokens
) -> ModelUse:
    return utilization(model, PLAN, text, counts, frequent)


def counts_of(n_layers: int) -> ParameterCounts:
    return ParameterCounts(0, 0, {f"{n}": RoutedParameters(4096, 1) for n in range(n_layers)})


def test_experts_that_are_too_many_to_pair() -> None:
    check_mixtures(counts_of(8))
    with pytest.raises(ValueError, match="36864 experts, up to 4096 of a layer: more than 1342177"):
        check_mixtures(counts_of(9))


def counted(text: HeldOut) -> list[tuple[int, int, int]]:
    """Batch, row and column of every token that counts."""
    return [
        (batch, *place)
        for batch, (_, labels) in enumerate(text.batches)
        for place in (labels != -100).nonzero().tolist()
    ]


def seen(decoder: Decoder, text: HeldOut, plan: SelectionPlan) -> dict[str, list[Tensor]]:
    """Probabilities `[E]` of every token that counts, by router."""
    with torch.no_grad():
        routings = [decoder(inputs, plan).routings for inputs, _ in text.batches]
    return {
        name: [
            routings[b].by_name()[name].routing.probs[row, column]
            for b, row, column in counted(text)
        ]
        for name in routed_layers(decoder)
    }


def test_gates_are_those_of_all_experts(decoder: Decoder, text: HeldOut, use: ModelUse) -> None:
    for name, probs in seen(decoder, text, SelectionPlan()).items():
        expected = expert_utilization(torch.stack(probs))
        router = use.layers[name]
        for found, value in zip(router.gates, expected, strict=True):
            torch.testing.assert_close(found, value)
        assert router.best_N.tolist() == [int(p.argmax()) for p in probs]


def test_experts_that_run_together(decoder: Decoder, text: HeldOut, use: ModelUse) -> None:
    for name, probs in seen(decoder, text, PLAN).items():
        selection = PLAN.selections(routed_layers(decoder))[name]
        assert use.selections[name] == selection
        n = len(probs[0])
        together = [[0] * n for _ in range(n)]
        for p in probs:
            running = selection.mask(p[None])[0].nonzero().flatten().tolist()
            for first in running:
                for second in running:
                    together[first][second] += 1
        router = use.layers[name]
        expected = torch.tensor(together, dtype=torch.float64) / len(probs)
        torch.testing.assert_close(router.together_EE, expected)
        assert router.running_E.tolist() == pytest.approx(expected.diagonal().tolist())


def test_losses_and_active_share_are_those_of_the_plans(
    model: SparseModel, text: HeldOut, counts: ParameterCounts, use: ModelUse
) -> None:
    plan = evaluate_plan(model, PLAN, text, counts)
    assert use.loss == pytest.approx(evaluate_plan(model, SelectionPlan(), text, counts).loss)
    assert use.plan_loss == pytest.approx(plan.loss)
    assert use.active.mean.item() == pytest.approx(plan.active_share_mean)
    assert use.active.p95.item() == pytest.approx(plan.active_share_p95)
    assert use.plan_loss != use.loss


def test_each_batch_is_told_of(
    model: SparseModel, text: HeldOut, counts: ParameterCounts, frequent: FrequentTokens
) -> None:
    calls: list[int] = []
    utilization(model, PLAN, text, counts, frequent, lambda: calls.append(1))
    assert len(calls) == len(text.batches)


def test_tokens_that_experts_like(
    decoder: Decoder, text: HeldOut, use: ModelUse, frequent: FrequentTokens
) -> None:
    tokens = [int(text.batches[b][0][row, column]) for b, row, column in counted(text)]
    often = [t for t in range(29) if tokens.count(t) >= LEAST]
    assert 1 < len(often) < 29
    assert frequent.numbers_U.tolist() == often
    assert frequent.counts_U.tolist() == [tokens.count(t) for t in often]
    for name, probs in seen(decoder, text, SelectionPlan()).items():
        router = use.layers[name]
        top = over_represented(router.token_gates_UE, router.gates.share, frequent, most=3)
        for expert, found in enumerate(top):
            mean = sum(p[expert].item() for p in probs) / len(probs)
            lifts = {}
            for token in often:
                gates = [p[expert].item() for p, t in zip(probs, tokens, strict=True) if t == token]
                lifts[token] = sum(gates) / len(gates) / mean
            best = sorted(lifts, key=lambda t: -lifts[t])[:3]
            assert [each.token for each in found] == [t for t in best if lifts[t] > 1]
            for each in found:
                assert each.lift == pytest.approx(lifts[each.token], rel=1e-4)
                assert each.occurrences == tokens.count(each.token)


def test_without_frequent_tokens_nothing_is_liked(
    model: SparseModel, text: HeldOut, counts: ParameterCounts
) -> None:
    nothing = frequent_tokens(text, 10_000)
    router = utilization(model, PLAN, text, counts, nothing).layers["blocks.0.feed_forward"]
    top = over_represented(router.token_gates_UE, router.gates.share, nothing, most=3)
    assert top == [[]] * 5


def router_use(together: list[list[float]], share: list[float]) -> RouterUse:
    """A router of which only some numbers matter."""
    gates = expert_utilization(torch.tensor([share]))
    nothing = torch.zeros(0)
    return RouterUse(gates, torch.tensor(together), nothing, nothing)


def test_dead_experts_have_no_share_or_never_run() -> None:
    together = [[0.9, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0], [0.0] * 4, [0.0, 0.0, 0.0, 0.2]]
    assert router_use(together, [0.5, 0.002, 0.3, 0.198]).dead_experts == [1, 2]
    assert router_use(together, [0.5, 0.0026, 0.3, 0.1974]).dead_experts == [2]


def test_strongest_pairs() -> None:
    together = [[0.5, 0.1, 0.0], [0.1, 0.4, 0.3], [0.0, 0.3, 0.6]]
    first, second = strongest_pairs(torch.tensor(together), 3)
    assert (first.first, first.second) == (1, 2)
    assert first.share == pytest.approx(0.3)
    assert first.lift == pytest.approx(0.3 / (0.4 * 0.6))
    assert (second.first, second.second) == (0, 1)
    assert strongest_pairs(torch.tensor(together), 1) == [first]
    assert strongest_pairs(torch.ones(1, 1), 3) == []


def test_drift(
    decoder: Decoder,
    text: HeldOut,
    counts: ParameterCounts,
    frequent: FrequentTokens,
    use: ModelUse,
) -> None:
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "router" in name:
                parameter.mul_(-2)
    other_model = compile_sparse(
        decoder, SelectionPlan(), switch_points=SwitchPoints(gather_up_to=0)
    )
    other = utilization(other_model, PLAN, text, counts, frequent)
    found = drift(use, other)
    assert (found.loss, found.plan_loss) == (other.loss, other.plan_loss)
    assert len(found.layers) == 4
    for name, router in found.layers.items():
        own, before = use.layers[name], other.layers[name]
        torch.testing.assert_close(router.change_E, own.gates.share - before.gates.share)
        changed = [a != b for a, b in zip(own.best_N, before.best_N, strict=True)]
        assert router.changed == pytest.approx(sum(changed) / len(changed))
        assert router.changed > 0
    assert [router.changed for router in drift(use, use).layers.values()] == [0.0] * 4


@pytest.mark.parametrize("context", [4, 7, 100])
def test_samples_run_in_windows(context: int, decoder: Decoder, model: SparseModel) -> None:
    tokens = torch.arange(20) % 29
    found = sample_routing(model, PLAN, tokens, context=context, most=15)
    assert found.tokens == list(range(15))
    assert found.left_out == 5
    running = torch.zeros(15, dtype=torch.int64)
    with torch.no_grad():
        parts = [decoder(part[None], PLAN).routings for part in tokens[:15].split(context)]
    for name, selection in PLAN.selections(routed_layers(decoder)).items():
        probs = torch.cat([part.by_name()[name].routing.probs[0] for part in parts])
        mask = selection.mask(probs)
        assert torch.equal(found.layers[name], mask)
        running += mask.sum(-1)
    assert torch.equal(found.n_running_T, running)


def test_an_empty_sample(model: SparseModel) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        sample_routing(model, PLAN, torch.zeros(0, dtype=torch.int64), context=4, most=5)


def small_model(attention: object, feed_forward: object) -> SparseModel:
    decoder = Decoder(29, 16, 2, attention=attention, feed_forward=feed_forward)  # type: ignore[arg-type]
    return compile_sparse(decoder, SelectionPlan(), switch_points=SwitchPoints(gather_up_to=0))


def test_layers_without_mixtures(text: HeldOut, frequent: FrequentTokens) -> None:
    plain_attention = partial(GroupedQueryAttention, n_heads=2, n_kv_heads=1, d_head=4)
    plain_layer = partial(FeedForward, d_hidden=8)
    experts = partial(MixtureOfExperts, n_experts=5, d_expert=6)
    heads = partial(MixtureOfAttentionHeads, n_experts=3, n_heads=1, d_head=4)
    plan = SelectionPlan()
    for attention, feed_forward in ((plain_attention, experts), (heads, plain_layer)):
        model = small_model(attention, feed_forward)
        counts = count_parameters(
            Decoder(29, 16, 2, attention=attention, feed_forward=feed_forward)
        )
        use = utilization(model, plan, text, counts, frequent)
        name = "feed_forward" if feed_forward is experts else "attention"
        assert list(use.layers) == [f"blocks.0.{name}", f"blocks.1.{name}"]
        assert drift(use, use).loss == use.loss
        sample = sample_routing(model, plan, torch.arange(9), context=4, most=9)
        assert sample.n_running_T.tolist() == [2 * (5 if feed_forward is experts else 3)] * 9
    model = small_model(plain_attention, plain_layer)
    with pytest.raises(ValueError, match="no mixture of experts or of attention heads"):
        utilization(model, plan, text, count_parameters(model.decoder), frequent)


def test_a_plan_that_does_not_fit(
    model: SparseModel, text: HeldOut, counts: ParameterCounts, frequent: FrequentTokens
) -> None:
    plan = SelectionPlan(layers={"blocks.2.attention": TopK(1)})
    with pytest.raises(ValueError, match=r"no routed layer 'blocks\.2\.attention'"):
        utilization(model, plan, text, counts, frequent)
    plan = SelectionPlan(experts=TopK(6), attention=AllExperts())
    with pytest.raises(ValueError, match="k <= 5"):
        utilization(model, plan, text, counts, frequent)


def test_a_loss_that_is_no_number(
    decoder: Decoder, text: HeldOut, counts: ParameterCounts, frequent: FrequentTokens
) -> None:
    with torch.no_grad():
        decoder.embedding.weight[0] = math.nan
    broken = compile_sparse(decoder, SelectionPlan(), switch_points=SwitchPoints(gather_up_to=0))
    with pytest.raises(FloatingPointError, match="the loss is nan, under the plan nan"):
        utilization(broken, PLAN, text, counts, frequent)


def test_losses_are_means_over_counted_tokens(
    decoder: Decoder, text: HeldOut, use: ModelUse
) -> None:
    total = 0.0
    with torch.no_grad():
        logits = [decoder(inputs).logits for inputs, _ in text.batches]
    for batch, row, column in counted(text):
        label = text.batches[batch][1][row, column]
        total -= F.log_softmax(logits[batch][row, column], -1)[label].item()
    assert use.loss == pytest.approx(total / len(counted(text)), rel=1e-5)
    assert use.loss < math.log(29)

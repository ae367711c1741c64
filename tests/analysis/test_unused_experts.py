"""Experts that a text never uses, and that pruning them changes nothing on it."""

from functools import partial
from typing import Any

import pytest
import torch

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.unused_experts import Proof, prove, used_experts
from lightning_dsmoe.attention import GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts, MLPExperts
from lightning_dsmoe.inference import Remaining, SparseModel, SwitchPoints, compile_sparse, prune
from lightning_dsmoe.inference.engine.batched import grouped_layers
from lightning_dsmoe.routing import (
    AllExperts,
    CosineRouter,
    LinearRouter,
    MLPRouter,
    Selection,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

from ..pairwise import pairwise

SELECTIONS: list[Selection] = [
    TopK(1),
    TopK(2, renormalize=True),
    Threshold(0.9),
    Threshold(0.9, renormalize=True),
    ThresholdTopK(1.2),
    TopP(0.7),
    TopP(0.7, renormalize=True),
]
MODES = {"masked": 10**6, "grouped": 1}


def attention(**options: Any) -> Any:
    return partial(MixtureOfAttentionHeads, n_experts=5, n_heads=2, d_head=4, **options)


def feed_forward(**options: Any) -> Any:
    return partial(MixtureOfExperts, n_experts=6, d_expert=6, **options)


LINEAR = partial(LinearRouter, init_std=0.3)
MLP = partial(MLPRouter, d_hidden=5, init_std=1.0)
COSINE = partial(CosineRouter, d_hidden=4, init_scale=4.0)
DECODERS: dict[str, Any] = {
    "linear routers": (attention(router=LINEAR), feed_forward(router=LINEAR)),
    "the paper's gates": (
        attention(router=MLP, gate_scale="sum_to_one"),
        feed_forward(router=MLP, gate_scale="sum_to_one"),
    ),
    "biases": (
        attention(router=COSINE, bias=True, qk_norm=True),
        feed_forward(router=COSINE, experts=partial(MLPExperts, bias=True), d_shared=3),
    ),
    "plain attention": (
        partial(GroupedQueryAttention, n_heads=4, n_kv_heads=2, d_head=4),
        feed_forward(router=LINEAR),
    ),
    "plain feed-forward layers": (attention(router=LINEAR), partial(FeedForward, d_hidden=8)),
}
UNLIKELY = {"experts": [[1, 4], [0]], "attention": [[2], [0, 3]]}


def made(name: str) -> Decoder:
    """Some of its experts have a hard time being chosen."""
    attends, feeds = DECODERS[name]
    decoder = Decoder(29, 16, 2, attention=attends, feed_forward=feeds)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for layer, block in enumerate(decoder.blocks):
        for kind, part in (("experts", block.feed_forward), ("attention", block.attention)):
            if hasattr(part, "router"):
                part.router.register_forward_hook(partial(_lower, UNLIKELY[kind][layer]))
    return decoder.eval()


def _lower(unlikely: list[int], router: Any, inputs: Any, routing: Any) -> Any:
    logits = routing.logits.clone()
    logits[..., unlikely] -= 5.0
    return type(routing)(logits, logits.softmax(-1))


@pytest.fixture(params=DECODERS)
def unlike(request: pytest.FixtureRequest) -> Decoder:
    return made(request.param)


@pytest.fixture
def some_text() -> HeldOut:
    tokens = torch.randint(29, (3, 2, 16), generator=torch.Generator().manual_seed(3))
    return HeldOut([(part, part) for part in tokens], tokens.numel())


@pytest.fixture(autouse=True)
def grouping_always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_layers, "grouping_pays", lambda *args: True)


def compiled(
    decoder: Decoder, plan: SelectionPlan, mode: str = "grouped", **options: Any
) -> SparseModel:
    points = SwitchPoints(gather_up_to=0, grouped_from=MODES[mode])
    return compile_sparse(decoder, plan, switch_points=points, **options)


def uniform(selection: Selection) -> SelectionPlan:
    return SelectionPlan(experts=selection, attention=selection)


@torch.no_grad()
def ran(decoder: Decoder, plan: SelectionPlan, text: HeldOut) -> dict[str, list[set[int] | None]]:
    """The experts that run for any token, one token and expert after the other."""
    found: dict[str, list[set[int] | None]] = {}
    for inputs, _ in text.batches:
        routings = decoder(inputs, plan).routings
        for kind in ("experts", "attention"):
            layers = found.setdefault(kind, [None, None])
            for layer, routing in enumerate(getattr(routings, kind)):
                if routing is None:
                    continue
                active = getattr(plan, kind).mask(routing.probs)
                numbers = {e for _, _, e in active.nonzero().tolist()}
                layers[layer] = (layers[layer] or set()) | numbers
    return found


@pytest.mark.parametrize(
    ("selection", "mode", "unlike"),
    pairwise(selection=SELECTIONS, mode=MODES, unlike=DECODERS),
    indirect=["unlike"],
)
def test_nothing_changes_without_experts_that_never_run(
    selection: Selection, mode: str, unlike: Decoder, some_text: HeldOut
) -> None:
    plan = uniform(selection)
    whole = compiled(unlike, plan, mode)
    used = used_experts(whole, plan, some_text)
    pruned = compiled(prune(unlike, used), plan, mode)
    assert pruned.report().n_bytes < whole.report().n_bytes
    proof = prove(whole, pruned, plan, some_text)
    assert proof.holds
    assert proof.other_choices == 0
    assert proof.n_tokens == 96
    for inputs, _ in some_text.batches:
        expected, found = whole.logits(inputs), pruned.logits(inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_used_are_those_that_run(selection: Selection, unlike: Decoder, some_text: HeldOut) -> None:
    plan = uniform(selection)
    used = used_experts(compiled(unlike, plan), plan, some_text)
    expected = ran(unlike, plan, some_text)
    n_removed = 0
    for kind, sizes in zip(used._fields, unlike.plan_sizes, strict=True):
        for found, numbers, size in zip(getattr(used, kind), expected[kind], sizes, strict=True):
            if numbers is None or len(numbers) == size:
                assert found is None
                continue
            if isinstance(selection, ThresholdTopK):
                assert numbers <= set(found)
            else:
                assert list(found) == sorted(numbers)
            n_removed += size - len(found)
    assert n_removed > 0


def test_experts_that_are_counted_are_needed() -> None:
    """Of three experts above the threshold here and one there, two run for each token."""
    decoder = made("linear routers")
    selection = ThresholdTopK(1.0)
    probs = torch.tensor([[0.24, 0.23, 0.22, 0.1, 0.11, 0.1], [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
    assert selection.mask(probs).sum(-1).tolist() == [2, 2]

    def routed(router: Any, inputs: Any, routing: Any) -> Any:
        return type(routing)(probs.log()[None], probs[None])

    decoder.blocks[0].feed_forward.router.register_forward_hook(routed)
    inputs = torch.tensor([[3, 4]])
    plan = SelectionPlan.of_blocks((selection, AllExperts()), (AllExperts(), AllExperts()))
    model = compiled(decoder, plan)
    used = used_experts(model, plan, HeldOut([(inputs, inputs)], 2))
    assert used == Remaining(((0, 1, 2), None), (None, None))


def test_all_experts_are_all_used(some_text: HeldOut) -> None:
    decoder = made("linear routers")
    plan = uniform(AllExperts())
    used = used_experts(compiled(decoder, plan), plan, some_text)
    assert used == Remaining((None, None), (None, None))


def test_a_proof_that_fails(some_text: HeldOut) -> None:
    decoder, plan = made("linear routers"), uniform(Threshold(0.5))
    whole = compiled(decoder, plan)
    used = used_experts(whole, plan, some_text)
    assert used.experts[0] is not None
    fewer = used._replace(experts=(used.experts[0][1:], used.experts[1]))
    proof = prove(whole, compiled(prune(decoder, fewer), plan), plan, some_text)
    assert not proof.holds
    expected = whole.decoder(some_text.batches[0][0], plan).logits
    assert proof.difference > 1e-3
    assert proof.other_choices > 0
    assert proof.largest_logit >= expected.abs().max().item() * (1 - 1e-5)
    assert not Proof(1, 1, 0, float("nan"), 1.0).holds
    assert not Proof(1, 1, 0, 1e-5, 1.0).holds
    assert not Proof(1, 1, 1, 0.0, 1.0).holds
    assert Proof(1, 1, 0, 1e-6, 1.0).holds


def test_in_8_bits(some_text: HeldOut) -> None:
    decoder, plan = made("biases"), uniform(TopK(2))
    whole = compiled(decoder, plan, quantization="int8")
    used = used_experts(whole, plan, some_text)
    pruned = compiled(prune(decoder, used), plan, quantization="int8")
    assert prove(whole, pruned, plan, some_text).holds


@pytest.mark.parametrize("selection", [TopK(1), ThresholdTopK(1.5)])
def test_what_is_pruned_can_be_pruned_again(selection: Selection, some_text: HeldOut) -> None:
    decoder, dense = made("linear routers"), uniform(TopP(0.8))
    first = prune(decoder, used_experts(compiled(decoder, dense), dense, some_text))
    sparse = uniform(selection)
    model = compiled(first, sparse)
    used = used_experts(model, sparse, some_text)
    assert used == used_experts(compiled(decoder, sparse), sparse, some_text)
    assert prove(model, compiled(prune(first, used), sparse), sparse, some_text).holds

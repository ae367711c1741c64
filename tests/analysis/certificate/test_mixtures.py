"""What a plan drops in each mixture: against loops over experts."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.analysis.certificate.mixtures import ErrorTotals, TokenErrors, token_errors
from lightning_dsmoe.attention import GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward, GLUExperts, MixtureOfExperts, MLPExperts
from lightning_dsmoe.inference import compile_sparse
from lightning_dsmoe.routing import (
    AllExperts,
    LinearRouter,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

from ...pairwise import pairwise

ROUTER = partial(LinearRouter, init_std=0.3)
BIASED: dict[str, Any] = {
    "attention": partial(
        MixtureOfAttentionHeads,
        n_experts=3,
        n_heads=2,
        d_head=4,
        router=ROUTER,
        gate_scale="sum_to_one",
        qk_norm=True,
        bias=True,
    ),
    "feed_forward": partial(
        MixtureOfExperts,
        n_experts=5,
        d_expert=6,
        router=ROUTER,
        experts=partial(MLPExperts, bias=True),
        d_shared=4,
    ),
}
PLAIN: dict[str, Any] = {
    "attention": partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=4, router=ROUTER),
    "feed_forward": partial(
        MixtureOfExperts, n_experts=6, d_expert=5, router=ROUTER, experts=GLUExperts
    ),
}
PLANS = [
    SelectionPlan.of_blocks((TopK(2), TopP(0.5)), (TopK(1), Threshold(0.9))),
    SelectionPlan.of_blocks((Threshold(1.0), ThresholdTopK(1.2)), (ThresholdTopK(1.1), TopP(0.6))),
    SelectionPlan.of_blocks(
        (TopK(1, renormalize=True), Threshold(0.8, renormalize=True)),
        (TopK(2, renormalize=True), TopP(0.4, renormalize=True)),
    ),
]


def make(parts: dict[str, Any], seed: int) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(29, 16, 2, **parts)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "router" not in name:
                parameter.mul_(3)
            if name.endswith((".b_in", ".b_out", ".b_q", ".b_o")):
                parameter.normal_()
    return decoder.eval()


@pytest.mark.parametrize(
    ("parts", "plan", "seed"), pairwise(parts=[BIASED, PLAIN], plan=PLANS, seed=range(3))
)
def test_the_bound_holds(parts: dict[str, Any], plan: SelectionPlan, seed: int) -> None:
    decoder, tokens = make(parts, seed), torch.randint(29, (3, 12))
    in_double = errors_of(copy.deepcopy(decoder).double(), tokens, plan)
    rounded = errors_of(decoder, tokens, plan)
    assert len(in_double) == 4
    for name, found in in_double.items():
        assert (found.error <= found.bound * (1 + 1e-12) + 1e-14).all()
        assert found.error.mean() > 0.2 * found.bound.mean() > 1e-3
        other = rounded[name]
        assert (other.error <= other.bound * (1 + 1e-5) + 1e-5).all()


def errors_of(model: nn.Module, tokens: Tensor, plan: SelectionPlan) -> dict[str, TokenErrors]:
    return token_errors(model, plan, lambda: model(tokens))


@pytest.mark.parametrize("plan", PLANS)
def test_experts_against_a_loop(plan: SelectionPlan) -> None:
    decoder = make(BIASED, 7)
    tokens = torch.randint(29, (2, 9))
    x = decoder.embed(tokens)
    found = errors_of(decoder, tokens, plan)
    selections = decoder.selections(plan)
    for layer, block in enumerate(decoder.blocks):
        x = x + block.attention(block.attention_norm(x), selections.attention[layer]).output
        seen, mixture, selection = (
            block.feed_forward_norm(x),
            block.feed_forward,
            selections.experts[layer],
        )
        probs = mixture.router(seen).probs
        gates = selection(probs)
        dropped_mass, seen_error, seen_bound = (
            each.view(2, 9) for each in found[f"blocks.{layer}.feed_forward"]
        )
        dropped = torch.where(gates.active, 0.0, probs).sum(-1)
        torch.testing.assert_close(dropped_mass, dropped)
        dense, sparse = mixture(seen).output, mixture(seen, selection).output
        for b in range(2):
            for t in range(9):
                size = dense[b, t].norm()
                bound = torch.zeros(())
                for e in range(5):
                    change = 5 * (gates.weight[b, t, e] - probs[b, t, e]).abs()
                    bound += change * expert_output(mixture, e, seen[b, t]).norm()
                assert seen_bound[b, t].item() == pytest.approx(
                    (bound / size).item(), rel=1e-4, abs=1e-6
                )
                error = (sparse[b, t] - dense[b, t]).norm() / size
                assert seen_error[b, t].item() == pytest.approx(error.item(), rel=1e-3, abs=1e-6)
        x = x + sparse


def expert_output(mixture: MixtureOfExperts, e: int, x_D: Tensor) -> Tensor:
    experts = mixture.experts
    assert experts.b_in is not None
    hidden = torch.nn.functional.gelu(experts.w_in.weight[e] @ x_D + experts.b_in[e])
    return hidden @ experts.w_out.weight[e]


def test_heads_by_taking_others_away() -> None:
    """With two groups of heads, dropping one changes the output by exactly its part."""
    parts = BIASED | {"attention": partial(BIASED["attention"], n_experts=2)}
    decoder = make(parts, 3)
    plan = SelectionPlan(attention=TopK(1))
    found = errors_of(decoder, torch.randint(29, (2, 9)), plan)
    for errors in (found["blocks.0.attention"], found["blocks.1.attention"]):
        torch.testing.assert_close(errors.error, errors.bound, rtol=1e-4, atol=1e-6)
        assert (errors.dropped_mass < 0.5).all()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_packed_decoders_and_all_experts(quantization: Any) -> None:
    decoder = make(BIASED, 5)
    tokens = torch.randint(29, (2, 9))
    model = compile_sparse(decoder, PLANS[0], quantization=quantization)
    if quantization is None:
        expected = errors_of(decoder, tokens, PLANS[0])
        for name, found in errors_of(model.decoder, tokens, PLANS[0]).items():
            for one, other in zip(found, expected[name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    everyone = SelectionPlan(experts=AllExperts(), attention=AllExperts())
    for errors in errors_of(model.decoder, tokens, everyone).values():
        assert not any(values.any() for values in errors)


def test_layers_without_a_router() -> None:
    attention = partial(GroupedQueryAttention, n_heads=2, n_kv_heads=1, d_head=4)
    feed_forward = partial(FeedForward, d_hidden=8)
    decoder = make({"attention": attention, "feed_forward": feed_forward}, 1)
    with pytest.raises(ValueError, match="with routed layers"):
        errors_of(decoder, torch.randint(29, (2, 9)), SelectionPlan())


def test_totals_count_the_tokens_that_count() -> None:
    totals = ErrorTotals()
    batches = [torch.rand(3, 2, 4) for _ in range(3)]
    masks = [torch.rand(2, 4) > 0.4, torch.zeros(2, 4, dtype=torch.bool), torch.rand(2, 4) > 0.4]
    for batch, mask in zip(batches, masks, strict=True):
        totals.add(TokenErrors(*batch.flatten(1)), mask)
    found = totals.compute()
    counted = torch.cat([batch[:, mask] for batch, mask in zip(batches, masks, strict=True)], 1)
    expected = [n for row in counted for n in (row.mean().item(), row.max().item())]
    assert list(found) == pytest.approx(expected)
    assert list(ErrorTotals().compute()) == [0] * 6

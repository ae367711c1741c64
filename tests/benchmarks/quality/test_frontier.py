"""How a trained model is measured for the paper's claims."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lightning_dsmoe import (
    Decoder,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    Threshold,
    TopK,
    compile_sparse,
)
from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.plans.routing_statistics import RouterStatistics, Statistics
from lightning_dsmoe.commands.evaluation_setup import Trained
from lightning_dsmoe.inference import SwitchPoints
from lightning_dsmoe.metrics import count_parameters
from lightning_dsmoe.tokenizers import ByteTokenizer


def test_plans_are_measured_as_a_plain_loop_does(benchmark_modules: SimpleNamespace) -> None:
    decoder = Decoder(
        11,
        16,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=3, n_heads=1, d_head=8),
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=4),
    ).eval()
    for block in decoder.blocks:
        for layer in (block.attention, block.feed_forward):
            torch.nn.init.normal_(layer.router.weight)
    batches = [tuple(torch.randint(11, (2, 2, 16))) for _ in range(5)]
    counts, plan = count_parameters(decoder), SelectionPlan()
    model = compile_sparse(decoder, plan, switch_points=SwitchPoints(gather_up_to=0))
    trained = Trained(model, counts, HeldOut(batches, 160), ByteTokenizer())
    found = benchmark_modules.frontier.measure(trained, plan, [0.8], 0.48)

    def loss(plan: SelectionPlan) -> float:
        losses = [
            F.cross_entropy(decoder(inputs, plan).logits.flatten(0, 1), labels.flatten())
            for inputs, labels in batches
        ]
        return torch.stack(losses).mean().item()

    assert found["points"][0]["loss"] == pytest.approx(loss(plan), rel=1e-5)
    fixed = [point for point in found["points"] if point["plan"].startswith("top")]
    assert [point["rule"] for point in fixed] == ["threshold", "top-k"]
    for point in fixed:
        k, heads = (int(number) for number in re.findall(r"\d+", point["plan"]))
        of_heads = SelectionPlan(experts=TopK(k), attention=TopK(heads))
        assert point["loss"] == pytest.approx(loss(of_heads), rel=1e-5)
        experts, attention = (
            counts.layers[f"blocks.0.{name}"] for name in ("feed_forward", "attention")
        )
        routed = 2 * (k * experts.per_expert + heads * attention.per_expert)
        assert point["share"] == pytest.approx((counts.always + routed) / counts.hidden)
    [mixed] = [point for point in found["points"] if point["rule"] == "mixed"]
    eps, heads = mixed["plan"].removeprefix("threshold ").split(", attention top ")
    of_kinds = SelectionPlan(experts=Threshold(float(eps)), attention=TopK(int(heads)))
    assert mixed["loss"] == pytest.approx(loss(of_kinds), rel=1e-3)  # eps has three digits
    probs = [
        routing.probs for inputs, _ in batches[::4] for routing in decoder(inputs).routings.experts
    ]
    kept = torch.stack([((p * 4 > 0.48).sum(-1)).float().mean() for p in probs]).mean().item()
    assert found["running"]["experts"]["share"] == pytest.approx(kept / 4, rel=1e-5)
    assert found["running"]["experts"]["beyond_one"] == pytest.approx((kept - 1) / 3, rel=1e-5)


def test_thresholds_come_closer_to_a_share_by_what_is_measured(
    benchmark_modules: SimpleNamespace,
) -> None:
    """A model of which a tenth less runs than all experts' routing makes one think."""
    probs = torch.rand(2000, 8).softmax(-1).sort(dim=-1, descending=True).values
    statistics = Statistics({"mlp": RouterStatistics("experts", probs, 10)}, 20, 100)

    def measured(plan: SelectionPlan) -> float:
        return 0.9 * statistics.share({"mlp": plan.experts.eps})

    find = benchmark_modules.frontier.threshold
    assert measured(find(statistics, 0.6, measured)) == pytest.approx(0.6, abs=0.002)
    assert find(statistics, 0.25, measured) is None


def test_numbers_of_experts_are_chosen_on_a_part_of_the_text(
    benchmark_modules: SimpleNamespace,
) -> None:
    labels = [torch.full((1, 3), number) for number in range(9)]
    labels[4][0, 0] = -100
    text = HeldOut([(each, each) for each in labels], 26)
    part = benchmark_modules.frontier.every_fourth(text)
    assert [int(inputs[0, 1]) for inputs, _ in part.batches] == [0, 4, 8]
    assert part.n_tokens == 8


# Judging

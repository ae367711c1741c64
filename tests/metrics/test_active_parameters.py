import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import Remaining, prune
from lightning_dsmoe.metrics import (
    ActiveParameters,
    ActiveSums,
    ParameterCounts,
    RoutedParameters,
    active_masks,
    active_parameters,
    count_parameters,
)
from lightning_dsmoe.routing import AllExperts, SelectionPlan, Threshold, TopK

COUNTS = ParameterCounts(
    outside=1000,
    always=50,
    layers={"mlp": RoutedParameters(4, 10), "heads": RoutedParameters(2, 30)},
)


def random_masks(*shape: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(*shape, 4, generator=generator) < 0.5
    attention = torch.rand(*shape, 2, generator=generator) < 0.5
    return {"mlp": experts, "heads": attention}


def test_top_two_of_a_small_model_by_hand(small_decoder: Decoder) -> None:
    decoder = small_decoder
    plan = SelectionPlan(experts=TopK(2), attention=TopK(2))
    routings = decoder(torch.randint(97, (2, 6)), plan).routings
    mask = torch.ones(2, 6, dtype=torch.bool)
    share = active_parameters(count_parameters(decoder), active_masks(routings, plan), mask)

    always = 2 * (2 * 32 + 2 * 4 * 32 + 32 * 2 * 8) + 32
    routed = 2 * (3 * 24 * 32 + 2 * 8 * 32)
    expected = (always + 2 * routed) / (always + 4 * routed)
    assert share.mean.item() == pytest.approx(expected, rel=1e-6)
    assert share.p50.item() == share.p95.item() == pytest.approx(expected, abs=5e-4)


def test_all_experts_are_all_parameters(decoder: Decoder) -> None:
    plan = SelectionPlan()
    routings = decoder(torch.randint(10, (2, 5)), plan).routings
    mask = torch.ones(2, 5, dtype=torch.bool)
    share = active_parameters(count_parameters(decoder), active_masks(routings, plan), mask)
    assert share == (1, 1, 1)


def test_threshold_mean_is_the_mean_of_counts_per_token(small_decoder: Decoder) -> None:
    decoder = small_decoder
    for parameter in decoder.parameters():
        parameter.data.mul_(5)
    plan = SelectionPlan(experts=Threshold(1.0), attention=Threshold(0.5))
    tokens = torch.randint(97, (2, 8))
    mask = torch.rand(2, 8) < 0.7
    routings = decoder(tokens, plan).routings
    counts = count_parameters(decoder)
    per_token = []
    for b, t in mask.nonzero().tolist():
        active = counts.always
        for layer in range(2):
            experts, heads = routings.experts[layer], routings.attention[layer]
            active += 3 * 24 * 32 * max(1, int((experts.probs[b, t] * 4 > 1.0).sum()))
            active += 2 * 8 * 32 * max(1, int((heads.probs[b, t] * 4 > 0.5).sum()))
        per_token.append(active / counts.hidden)
    assert len(set(per_token)) > 1

    share = active_parameters(counts, active_masks(routings, plan), mask)
    assert share.mean.item() == pytest.approx(sum(per_token) / len(per_token), rel=1e-6)


@given(tokens=st.integers(1, 40), seed=st.integers(0, 99))
def test_quantiles_are_nearest_ranks_to_a_thousandth(tokens: int, seed: int) -> None:
    masks = random_masks(tokens, seed=seed)
    experts, attention = masks.values()
    shares = sorted(((50 + 10 * experts.sum(-1) + 30 * attention.sum(-1)) / 150).tolist())
    share = active_parameters(COUNTS, masks)
    for percent, value in ((50, share.p50), (95, share.p95)):
        rank = -(-percent * tokens // 100) - 1
        assert value.item() == pytest.approx(shares[rank], abs=5.1e-4)


def test_batches_and_merged_halves_add_up_to_the_whole() -> None:
    masks = random_masks(30)
    mask = torch.rand(30) < 0.8
    halves = [ActiveParameters(COUNTS), ActiveParameters(COUNTS)]
    for half, part in zip(halves, (slice(0, 11), slice(11, 30)), strict=True):
        half.update({name: each[part] for name, each in masks.items()}, mask[part])
    halves[0].merge_state(halves[1])
    assert halves[0].compute() == active_parameters(COUNTS, masks, mask)


def test_no_token_is_zero() -> None:
    mask = torch.zeros(5, dtype=torch.bool)
    assert active_parameters(COUNTS, random_masks(5), mask) == (0, 0, 0)


def test_masks_must_fit() -> None:
    masks = random_masks(5)
    mask = torch.ones(5, dtype=torch.bool)
    with pytest.raises(ValueError, match="masks of mlp, a model with mlp, heads"):
        active_parameters(COUNTS, {"mlp": masks["mlp"]}, mask)
    with pytest.raises(ValueError, match="masks of no layer, a model with mlp, heads"):
        active_parameters(COUNTS, {}, mask)
    with pytest.raises(ValueError, match=r"heads: a mask of shape \(5, 2\), got \(5, 4\)"):
        active_parameters(COUNTS, masks | {"heads": masks["mlp"]}, mask)
    with pytest.raises(ValueError, match=r"mlp: a mask of shape \(4, 4\), got \(5, 4\)"):
        active_parameters(COUNTS, masks, mask[:4])
    with pytest.raises(ValueError, match=r"heads: a mask of shape \(5, 2\), got \(10, 2\)"):
        active_parameters(COUNTS, masks | {"heads": masks["heads"].repeat(2, 1)}, mask)
    windows = random_masks(6, 3)  # twice as many sequences are no second call of a layer
    with pytest.raises(ValueError, match=r"heads: a mask of shape \(3, 3, 2\), got \(6, 3, 2\)"):
        active_parameters(COUNTS, windows | {"mlp": windows["mlp"][:3]})
    nothing = ParameterCounts(outside=0, always=5, layers={})
    with pytest.raises(ValueError, match="without routed layers needs a mask"):
        active_parameters(nothing, {})
    assert active_parameters(nothing, {}, mask) == (1, 1, 1)


def test_masks_under_a_plan(mixed_decoder: Decoder) -> None:
    plan = SelectionPlan(experts=TopK(2), attention=AllExperts())
    masks = active_masks(mixed_decoder(torch.randint(10, (1, 4)), plan).routings, plan)
    running = {name: mask.sum(-1).unique().tolist() for name, mask in masks.items()}
    assert running == {"blocks.1.feed_forward": [2], "blocks.2.attention": [2]}


def test_removed_experts_do_not_run(small_decoder: Decoder) -> None:
    plan = SelectionPlan(experts=TopK(2), attention=TopK(3))
    pruned = prune(small_decoder, Remaining(((1,), None), ((0, 3), None)))
    routings = pruned(torch.randint(97, (2, 6)), plan).routings
    found = active_masks(routings, plan, pruned)
    experts, attention = found["blocks.0.feed_forward"], found["blocks.0.attention"]
    assert [experts[..., e].unique().tolist() for e in range(4)] == [[0], [1], [0], [0]]
    assert [attention[..., e].unique().tolist() for e in range(4)] == [[1], [0], [0], [1]]
    assert found["blocks.1.feed_forward"].sum(-1).unique().tolist() == [2]
    whole = active_masks(routings, plan)["blocks.0.feed_forward"]
    assert whole.sum(-1).unique().tolist() == [2]


def test_plot() -> None:
    metric = ActiveParameters(COUNTS)
    metric.update(random_masks(30))
    figure, axes = metric.plot()
    assert isinstance(figure, Figure)
    assert sum(bar.get_height() for bar in axes.patches) == 30


def test_sums_of_batches_are_those_of_the_metric() -> None:
    metric, sums = ActiveParameters(COUNTS), ActiveSums(COUNTS)
    for seed in range(3):
        masks, mask = random_masks(5, 7, seed=seed), torch.arange(7).expand(5, 7) < 3 + seed
        metric.update(masks, mask)
        sums.add(masks, mask)
    assert sums.share() == metric.compute()

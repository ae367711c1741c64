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
    experts=(RoutedParameters(4, 10), None),
    attention=(None, RoutedParameters(2, 30)),
)


def random_masks(*shape: int, seed: int = 0) -> tuple[list[Tensor | None], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(*shape, 4, generator=generator) < 0.5
    attention = torch.rand(*shape, 2, generator=generator) < 0.5
    return [experts, None], [None, attention]


def test_top_two_of_a_small_model_by_hand(small_decoder: Decoder) -> None:
    decoder = small_decoder
    plan = SelectionPlan.uniform(2, experts=TopK(2), attention=TopK(2))
    routings = decoder(torch.randint(97, (2, 6)), plan).routings
    mask = torch.ones(2, 6, dtype=torch.bool)
    share = active_parameters(count_parameters(decoder), *active_masks(routings, plan), mask)

    always = 2 * (2 * 32 + 2 * 4 * 32 + 32 * 2 * 8) + 32
    routed = 2 * (3 * 24 * 32 + 2 * 8 * 32)
    expected = (always + 2 * routed) / (always + 4 * routed)
    assert share.mean.item() == pytest.approx(expected, rel=1e-6)
    assert share.p50.item() == share.p95.item() == pytest.approx(expected, abs=5e-4)


def test_all_experts_are_all_parameters(decoder: Decoder) -> None:
    plan = SelectionPlan.uniform(decoder.n_layers)
    routings = decoder(torch.randint(10, (2, 5)), plan).routings
    mask = torch.ones(2, 5, dtype=torch.bool)
    share = active_parameters(count_parameters(decoder), *active_masks(routings, plan), mask)
    assert share == (1, 1, 1)


def test_threshold_mean_is_the_mean_of_counts_per_token(small_decoder: Decoder) -> None:
    decoder = small_decoder
    for parameter in decoder.parameters():
        parameter.data.mul_(5)
    plan = SelectionPlan.uniform(2, experts=Threshold(1.0), attention=Threshold(0.5))
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

    share = active_parameters(counts, *active_masks(routings, plan), mask)
    assert share.mean.item() == pytest.approx(sum(per_token) / len(per_token), rel=1e-6)


@given(tokens=st.integers(1, 40), seed=st.integers(0, 99))
def test_quantiles_are_nearest_ranks_to_a_thousandth(tokens: int, seed: int) -> None:
    (experts, _), (_, attention) = random_masks(tokens, seed=seed)
    assert experts is not None
    assert attention is not None
    shares = sorted(((50 + 10 * experts.sum(-1) + 30 * attention.sum(-1)) / 150).tolist())
    share = active_parameters(
        COUNTS, [experts, None], [None, attention], torch.ones(tokens, dtype=torch.bool)
    )
    for percent, value in ((50, share.p50), (95, share.p95)):
        rank = -(-percent * tokens // 100) - 1
        assert value.item() == pytest.approx(shares[rank], abs=5.1e-4)


def test_batches_and_merged_halves_add_up_to_the_whole() -> None:
    experts, attention = random_masks(30)
    mask = torch.rand(30) < 0.8
    halves = [ActiveParameters(COUNTS), ActiveParameters(COUNTS)]
    for half, part in zip(halves, (slice(0, 11), slice(11, 30)), strict=True):
        half.update(
            [None if m is None else m[part] for m in experts],
            [None if m is None else m[part] for m in attention],
            mask[part],
        )
    halves[0].merge_state(halves[1])
    assert halves[0].compute() == active_parameters(COUNTS, experts, attention, mask)


def test_no_token_is_zero() -> None:
    experts, attention = random_masks(5)
    mask = torch.zeros(5, dtype=torch.bool)
    assert active_parameters(COUNTS, experts, attention, mask) == (0, 0, 0)


def test_masks_must_fit() -> None:
    experts, attention = random_masks(5)
    mask = torch.ones(5, dtype=torch.bool)
    with pytest.raises(ValueError, match="masks of 1 layers, a decoder of 2"):
        active_parameters(COUNTS, experts[:1], attention, mask)
    with pytest.raises(ValueError, match=r"attention, layer 1: a mask of shape \(5, 2\), got None"):
        active_parameters(COUNTS, experts, [None, None], mask)
    with pytest.raises(ValueError, match=r"experts, layer 0.*\(4, 4\), got \(5, 4\)"):
        active_parameters(COUNTS, experts, attention, mask[:4])


def test_masks_under_a_plan(mixed_decoder: Decoder) -> None:
    plan = SelectionPlan.uniform(3, experts=TopK(2), attention=AllExperts())
    experts, attention = active_masks(mixed_decoder(torch.randint(10, (1, 4)), plan).routings, plan)
    assert [None if m is None else m.sum(-1).unique().tolist() for m in experts] == [
        None,
        [2],
        None,
    ]
    assert [None if m is None else m.all().item() for m in attention] == [None, None, True]


def test_removed_experts_do_not_run(small_decoder: Decoder) -> None:
    plan = SelectionPlan.uniform(2, experts=TopK(2), attention=TopK(3))
    pruned = prune(small_decoder, Remaining(((1,), None), ((0, 3), None)))
    routings = pruned(torch.randint(97, (2, 6)), plan).routings
    experts, attention = active_masks(routings, plan, pruned)
    assert [experts[0][..., e].unique().tolist() for e in range(4)] == [[0], [1], [0], [0]]
    assert [attention[0][..., e].unique().tolist() for e in range(4)] == [[1], [0], [0], [1]]
    assert experts[1].sum(-1).unique().tolist() == [2]
    whole = active_masks(routings, plan)[0][0]
    assert whole.sum(-1).unique().tolist() == [2]


def test_plot() -> None:
    experts, attention = random_masks(30)
    metric = ActiveParameters(COUNTS)
    metric.update(experts, attention, torch.ones(30, dtype=torch.bool))
    figure, axes = metric.plot()
    assert isinstance(figure, Figure)
    assert sum(bar.get_height() for bar in axes.patches) == 30

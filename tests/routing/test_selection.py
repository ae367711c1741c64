import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dsmoe.routing import AllExperts, Selection, Threshold, ThresholdTopK, TopK, TopP

SMALL = settings(max_examples=40, deadline=None, derandomize=True)
ROW = torch.tensor([[0.1, 0.4, 0.3, 0.2]])


def probabilities(experts: int, *, tokens: int = 6, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(tokens, experts)).softmax(-1)


@pytest.mark.parametrize(
    ("selection", "active"),
    [
        (AllExperts(), [1, 1, 1, 1]),
        (TopK(1), [0, 1, 0, 0]),
        (TopK(3), [0, 1, 1, 1]),
        (Threshold(1.0), [0, 1, 1, 0]),
        (Threshold(3.9), [0, 1, 0, 0]),
        (ThresholdTopK(1.0), [0, 1, 1, 0]),
        (TopP(0.4), [0, 1, 0, 0]),
        (TopP(0.65), [0, 1, 1, 0]),
        (TopP(0.75), [0, 1, 1, 1]),
        (TopP(1.0), [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_experts_by_hand(selection: Selection, active: list[int]) -> None:
    gates = selection(ROW)
    assert gates.active.tolist() == [[bool(a) for a in active]]
    assert torch.equal(gates.weight, ROW * torch.tensor([active]))


@SMALL
@given(
    experts=st.integers(1, 12),
    scale=st.floats(0, 30),
    renormalize=st.booleans(),
    make=st.sampled_from(
        [
            AllExperts,
            partial(TopK, 1),
            partial(Threshold, 0.9),
            partial(ThresholdTopK, 0.9),
            partial(TopP, 0.3),
        ]
    ),
)
def test_one_expert_always_runs_at_its_own_gate(
    experts: int, scale: float, renormalize: bool, make: Callable[..., Selection]
) -> None:
    probs = probabilities(experts, scale=scale)
    weight, active = make(renormalize=renormalize)(probs)
    assert active.any(-1).all()
    assert active.gather(-1, probs.argmax(-1, keepdim=True)).all()
    assert torch.equal(weight[~active], torch.zeros_like(weight[~active]))
    if renormalize:
        torch.testing.assert_close(weight.sum(-1), torch.ones(len(probs)))
        probs = probs / (probs * active).sum(-1, keepdim=True)
    torch.testing.assert_close(weight[active], probs[active])


@SMALL
@given(experts=st.integers(1, 12), k=st.integers(1, 12))
def test_top_k_keeps_the_k_largest(experts: int, k: int) -> None:
    k = min(k, experts)
    probs = probabilities(experts)
    active = TopK(k).mask(probs)
    assert (active.sum(-1) == k).all()
    smallest_kept = probs.masked_fill(~active, 2).amin(-1)
    assert (probs.masked_fill(active, 0).amax(-1) <= smallest_kept).all()


@pytest.mark.parametrize("n_experts", [4, 256])
@pytest.mark.parametrize("selection", [TopK(2), Threshold(1.0), TopP(0.5)], ids=str)
def test_ties_go_to_lower_numbers(selection: Selection, n_experts: int) -> None:
    kept = {TopK: 2, Threshold: 1, TopP: n_experts // 2}[type(selection)]
    active = selection.mask(torch.full((3, n_experts), 1 / n_experts))
    assert active.tolist() == [[expert < kept for expert in range(n_experts)]] * 3


@SMALL
@given(experts=st.integers(1, 10), low=st.floats(0, 5), step=st.floats(0, 5))
def test_raising_a_threshold_never_adds_experts(experts: int, low: float, step: float) -> None:
    probs = probabilities(experts)
    high = min(low + step, experts * 0.999)
    fewer = Threshold(high).mask(probs)
    more = Threshold(min(low, high)).mask(probs)
    assert not (fewer & ~more).any()


def test_threshold_zero_keeps_everything() -> None:
    probs = probabilities(7)
    assert Threshold(0.0).mask(probs).all()


@SMALL
@given(experts=st.integers(1, 10), p=st.floats(0.01, 1))
def test_top_p_is_the_shortest_prefix_that_holds_p(experts: int, p: float) -> None:
    probs = probabilities(experts).double()
    active = TopP(p).mask(probs)
    kept = (probs * active).sum(-1)
    least = probs.masked_fill(~active, 2).amin(-1)
    assert (kept >= p - 1e-6).all()
    assert ((kept - least < p + 1e-6) | (active.sum(-1) == 1)).all()


@pytest.mark.parametrize("counts", [(1, 3, 2), (1, 3, 3), (1, 2, 2)], ids=str)
def test_threshold_top_k_gives_every_token_the_mean_count(counts: tuple[int, ...]) -> None:
    rows = {1: [0.97, 0.01, 0.01, 0.01], 2: [0.4, 0.4, 0.1, 0.1], 3: [0.3, 0.3, 0.3, 0.1]}
    probs = torch.tensor([rows[count] for count in counts])
    assert Threshold(1.0).mask(probs).sum(-1).tolist() == list(counts)
    assert ThresholdTopK(1.0).mask(probs).sum(-1).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "selection", [AllExperts(), TopK(2), Threshold(0.5), ThresholdTopK(0.5), TopP(0.5)], ids=str
)
def test_no_tokens_and_many_experts(selection: Selection) -> None:
    assert selection.mask(torch.rand(0, 4)).shape == (0, 4)
    many = probabilities(10_000, tokens=2)
    assert selection.mask(many).any(-1).all()


@pytest.mark.parametrize(
    ("make", "value"),
    [
        *((TopK, k) for k in (0, -1, 1.5, True, "2", None)),
        *((Threshold, eps) for eps in (-0.1, math.nan, math.inf, True)),
        *((ThresholdTopK, eps) for eps in (-0.1, math.nan)),
        *((TopP, p) for p in (0, -0.5, 1.1, math.nan, True)),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[Any], Selection], value: object) -> None:
    with pytest.raises(ValueError, match=f"needs .*, got .*={value!r}"):
        make(value)


@pytest.mark.parametrize("selection", [TopK(5), Threshold(4.0), ThresholdTopK(4.5)], ids=str)
def test_values_impossible_for_the_experts_are_refused(selection: Selection) -> None:
    for use in (lambda: selection.check(4), lambda: selection.mask(probabilities(4))):
        with pytest.raises(ValueError, match=r"\((k|eps)=(5|4\.0|4\.5)\).*\b4\b"):
            use()
    selection.check(6)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_renormalize_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match="renormalize must be true or false"):
        TopK(2, renormalize=value)

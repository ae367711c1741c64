"""Sampling: temperature, top k, top p, and logits that are not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.inference.sampling import Sampler

from .conftest import SAMPLINGS

LOGITS = torch.tensor([1.0, 3.0, 0.0, 2.5, -1.0, 2.9])


def shares(n: int = 40_000, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    drawn = Sampler(generator=generator, **options)(LOGITS.expand(n, -1))
    return drawn.bincount(minlength=6) / n


def test_samples_follow_the_softmax_at_a_temperature() -> None:
    for temperature in (0.5, 1.0, 4.0):
        expected = (LOGITS / temperature).softmax(-1)
        actual = shares(temperature=temperature)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.012)
    assert shares(n=10, temperature=0).tolist() == [0, 1, 0, 0, 0, 0]
    assert shares(temperature=1e6).sub(1 / 6).abs().max() < 0.012


@pytest.mark.parametrize("k", [1, 2, 5, 6, 100])
def test_top_k_keeps_the_k_most_probable(k: int) -> None:
    candidates = LOGITS.topk(min(k, 6)).indices
    expected = torch.zeros(6).index_put((candidates,), LOGITS[candidates].softmax(-1))
    actual = shares(top_k=k)
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.012)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_top_p_keeps_the_fewest_that_hold_p(p: float) -> None:
    probs = LOGITS.softmax(-1)
    actual = shares(top_p=p)
    candidates = actual > 0
    assert probs[candidates].sum() >= p - 1e-6
    assert probs[candidates].min() >= probs[~candidates].max() if p < 1 else candidates.all()
    assert probs[candidates].sum() - probs[candidates].min() < p
    torch.testing.assert_close(
        actual, probs * candidates / probs[candidates].sum(), rtol=0, atol=0.012
    )


def test_top_p_is_taken_of_what_top_k_leaves() -> None:
    candidates = LOGITS.topk(3).indices
    first_two = LOGITS[candidates].softmax(-1)[:2].sum().item()
    actual = shares(top_k=3, top_p=first_two - 1e-4)
    assert sorted(candidates[:2].tolist()) == actual.nonzero().flatten().tolist()
    assert len(shares(top_k=3, top_p=first_two + 1e-4).nonzero()) == 3


def test_equal_logits_are_told_apart_by_their_numbers() -> None:
    equal = torch.zeros(500, 6)
    assert sorted(Sampler(top_k=2)(equal).unique().tolist()) == [0, 1]
    assert sorted(Sampler(top_p=0.5)(equal).unique().tolist()) == [0, 1, 2]
    assert Sampler(temperature=0)(equal).unique().tolist() == [0]


def test_large_and_forbidden_logits() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, -torch.inf]]).repeat(50, 1)
    for half in (logits, torch.tensor([[6e4, -6e4, 0.0, -torch.inf]]).half()):
        for options in ({}, {"temperature": 1e-3}, {"top_p": 0.9}, {"top_k": 3}):
            assert Sampler(**options)(half).unique().tolist() == [0]
    forbidden = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).repeat(500, 1)
    assert sorted(Sampler(temperature=9.0)(forbidden).unique().tolist()) == [0, 2]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_are_not_finite(dtype: torch.dtype, options: dict[str, Any]) -> None:
    forbidden = torch.full((6,), -torch.inf)
    for value, row in (
        (torch.nan, LOGITS),
        (torch.inf, LOGITS),
        (torch.nan, forbidden),
        (-torch.inf, forbidden),
    ):
        logits = LOGITS.repeat(3, 1).to(dtype)
        logits[1] = row.to(dtype)
        logits[1, 4] = value
        with pytest.raises(FloatingPointError, match="the logits are not finite: weights hold NaN"):
            Sampler(**options)(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_equal_logits_the_first_is_taken(dtype: torch.dtype) -> None:
    logits = torch.randint(0, 5, (9, 997)).to(dtype)
    assert torch.equal(Sampler(temperature=0)(logits), logits.argmax(-1))

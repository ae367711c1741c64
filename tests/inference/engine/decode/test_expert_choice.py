"""The experts that a few tokens need together are those that the selection marks."""

import dataclasses

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.decode.expert_choice import ChosenExperts, choose_experts
from lightning_dsmoe.routing import (
    AllExperts,
    Routing,
    Selection,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)
from lightning_dsmoe.routing.removed import select

from ....pairwise import pairwise


def drawn(n_tokens: int, n_experts: int) -> list[Routing]:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(40, n_tokens, n_experts, generator=generator)
    equal = torch.randint(3, (10, n_tokens, n_experts), generator=generator).float()
    sure = torch.eye(n_experts)[-1:].expand(1, n_tokens, -1) * 50
    return [Routing(x, x.softmax(-1)) for x in torch.cat([logits, equal, sure])]


def spread(choice: ChosenExperts, n_experts: int) -> Tensor:
    """Gates `[B, E]` of all experts."""
    assert choice.experts_K is not None
    gates = torch.zeros(choice.gates_KB.shape[1], n_experts)
    return gates.index_add(1, choice.experts_K, choice.gates_KB.T)


@pytest.mark.parametrize(
    ("selection", "renormalize", "n_experts", "n_tokens"),
    pairwise(
        selection=[
            TopK(1),
            TopK(2),
            Threshold(0.9),
            Threshold(0.0),
            ThresholdTopK(0.7),
            TopP(0.7),
            TopP(1.0),
        ],
        renormalize=[False, True],
        n_experts=[2, 5, 16],
        n_tokens=[1, 2, 3, 17],
    ),
)
def test_experts_and_gates_are_those_of_the_selection(
    selection: Selection, renormalize: bool, n_experts: int, n_tokens: int
) -> None:
    selection = dataclasses.replace(selection, renormalize=renormalize)
    for routing in drawn(n_tokens, n_experts):
        gates, active = selection(routing.probs)
        expected = active.any(0).nonzero()[:, 0].tolist()
        choice = choose_experts(selection, routing)
        assert choice.experts_K is not None
        found = choice.experts_K.tolist()
        assert sorted(set(found)) == expected
        assert len(found) == len(choice.gates_KB)
        # A single expert may be followed by itself, under gates of zero.
        assert len(found) == len(expected) or (len(found), len(expected)) == (2, 1)
        assert not choice.gates_KB[len(expected) :].any()
        torch.testing.assert_close(spread(choice, n_experts), gates, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("selection", "remaining", "n_tokens"),
    pairwise(
        selection=[
            TopK(1),
            TopK(3),
            TopK(3, renormalize=True),
            Threshold(0.9),
            ThresholdTopK(0.7, renormalize=True),
            TopP(0.7),
            AllExperts(),
            AllExperts(renormalize=True),
        ],
        remaining=[[0, 2, 3], [1, 4], [2]],
        n_tokens=[1, 2, 17],
    ),
)
def test_experts_that_remain_are_numbered_among_themselves(
    selection: Selection, remaining: list[int], n_tokens: int
) -> None:
    numbers = torch.tensor(remaining)
    for routing in drawn(n_tokens, 5):
        expected = select(selection, routing, numbers).weight
        experts, gates = choose_experts(selection, routing, numbers)
        if experts is None:
            assert isinstance(selection, AllExperts)
            assert torch.equal(gates.T, expected)
            continue
        found = spread(ChosenExperts(experts, gates), len(remaining))
        torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_one_token_under_top_k_has_a_number_of_experts_known_beforehand(k: int) -> None:
    for routing in drawn(1, 5):
        experts, gates = choose_experts(TopK(k), routing)
        assert experts is not None
        assert experts.shape == (k,)
        assert gates.shape == (k, 1)


def test_no_more_experts_than_are_needed() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1], [0.1, 0.5, 0.1, 0.1, 0.2]])
    for selection, expected in ((TopK(1), [0, 1]), (TopK(2), [0, 1, 4]), (Threshold(1.4), [0, 1])):
        experts, gates = choose_experts(selection, Routing(probs.log(), probs))
        assert experts is not None
        assert sorted(experts.tolist()) == expected
        assert gates.shape == (len(expected), 2)


@pytest.mark.parametrize("selection", [TopK(1), Threshold(0.9), ThresholdTopK(0.0), TopP(0.5)])
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_the_only_expert_always_runs(n_tokens: int, selection: Selection) -> None:
    logits = torch.randn(n_tokens, 1)
    choice = choose_experts(selection, Routing(logits, logits.softmax(-1)))
    assert choice.experts_K is not None
    assert set(choice.experts_K.tolist()) == {0}
    assert torch.equal(spread(choice, 1), torch.ones(n_tokens, 1))


@pytest.mark.parametrize("renormalize", [False, True])
def test_all_experts_have_no_numbers(renormalize: bool) -> None:
    for n_tokens in (1, 3):
        for routing in drawn(n_tokens, 5):
            experts, gates = choose_experts(AllExperts(renormalize=renormalize), routing)
            assert experts is None
            assert torch.equal(gates, routing.probs.T)

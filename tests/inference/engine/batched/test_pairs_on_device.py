"""Sorting by expert with sizes that are known beforehand."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.batched.pairs_on_device import most_experts, sort_on_device
from lightning_dsmoe.routing import (
    AllExperts,
    Selection,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

from ....pairwise import pairwise

ACTIVE: dict[str, Callable[[int, int], Tensor]] = {
    "some": lambda n, e: torch.rand(n, e) < 0.4,
    "one takes all": lambda n, e: (torch.arange(e) == e // 2).expand(n, e),
    "all": lambda n, e: torch.ones(n, e, dtype=torch.bool),
    "none": lambda n, e: torch.zeros(n, e, dtype=torch.bool),
    "the last alone": lambda n, e: (torch.arange(e) == e - 1).expand(n, e),
}


@pytest.mark.parametrize(
    ("active", "n_tokens", "n_experts", "room"),
    pairwise(active=ACTIVE, n_tokens=[1, 2, 17], n_experts=[1, 5], room=[0, 3]),
)
def test_pairs_are_those_that_run(active: str, n_tokens: int, n_experts: int, room: int) -> None:
    active_NE = ACTIVE[active](n_tokens, n_experts)
    gates_NE = torch.rand(n_tokens, n_experts)
    counts = active_NE.sum(0).tolist()
    most = min(n_experts, int(active_NE.sum(1).max()) + room)
    n_pairs = sum(counts) + room
    pairs = sort_on_device(gates_NE, active_NE, n_pairs=n_pairs, most=most)
    assert pairs.ends_E.dtype == torch.int32
    assert pairs.ends_E.stride() == (1,)
    assert pairs.ends_E.tolist() == torch.tensor(counts).cumsum(0).tolist()
    spare = n_pairs  # one more than there is room for, so that no expert ends at the last
    assert len(pairs.token_P) == len(pairs.expert_P) == len(pairs.gate_P) == spare + 1
    expected = [(e, x) for e in range(n_experts) for x in range(n_tokens) if active_NE[x, e]]
    found = list(zip(pairs.expert_P.tolist(), pairs.token_P.tolist(), strict=True))
    assert found[: sum(counts)] == expected
    assert torch.equal(pairs.gate_P, gates_NE[pairs.token_P, pairs.expert_P])
    assert pairs.place_NK.shape == (n_tokens, most)
    for x, places in enumerate(pairs.place_NK.tolist()):
        own = [at for at, (_, token) in enumerate(expected) if token == x]
        assert places == own + [spare] * (most - len(own))


RULES = [
    *(TopK(k) for k in (1, 3, 8)),
    *(Threshold(eps) for eps in (0.0, 0.3, 1.0, 2.0, 2.7, 7.9)),
    *(ThresholdTopK(eps) for eps in (0.5, 2.0, 4.0)),
    *(TopP(p) for p in (1e-3, 0.25, 0.5, 0.99, 1.0)),
    AllExperts(),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_runs_more_experts_than_the_most(rule: Selection, dtype: torch.dtype) -> None:
    logits = torch.cat(
        [
            torch.zeros(1, 8),
            torch.eye(8),  # ties
            *(scale * torch.randn(30, 8) for scale in (0.01, 1, 10)),
            *(torch.where(torch.arange(8) < n, 0.0, -torch.inf)[None] for n in range(1, 9)),
        ]
    )
    most = most_experts(rule, 8)
    assert most is not None
    rows = logits.to(dtype).softmax(-1).split(1)  # one by one, as some rules look at all of them
    ran = max(int(rule.mask(probs_1E).sum()) for probs_1E in rows)
    assert most - 1 <= ran <= most <= 8


def test_nothing_is_said_of_other_selections() -> None:
    @dataclass(frozen=True)
    class Two(TopK):
        def mask(self, probs: Tensor) -> Tensor:
            return torch.ones_like(probs, dtype=torch.bool)

    assert most_experts(Two(2), 8) is None

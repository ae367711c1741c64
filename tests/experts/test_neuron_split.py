"""Neurons shared out among experts of equal size."""

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.experts.neuron_split import (
    balanced_assignment,
    by_activations,
    by_weights,
    contiguous,
)


def is_balanced(split_EF: Tensor, n_neurons: int, n_experts: int) -> bool:
    """Whether all neurons are there once, and zero neurons no more than one for an expert."""
    whole = split_EF.numel() // n_experts == -(-n_neurons // n_experts)
    numbers = split_EF.flatten().sort().values
    zeros_E = (split_EF >= n_neurons).sum(1)
    return whole and torch.equal(numbers, torch.arange(split_EF.numel())) and zeros_E.max() <= 1


@pytest.mark.parametrize(("n_neurons", "n_experts"), [(24, 4), (25, 4), (27, 4), (9, 8), (5, 5)])
def test_every_neuron_is_in_one_expert(n_neurons: int, n_experts: int) -> None:
    assert is_balanced(contiguous(n_neurons, n_experts), n_neurons, n_experts)
    assert is_balanced(by_weights(torch.randn(n_neurons, 7), n_experts), n_neurons, n_experts)
    hidden_NU = torch.randn(50, n_neurons)
    assert is_balanced(by_activations(hidden_NU, n_experts), n_neurons, n_experts)


@pytest.mark.parametrize("n_experts", [0, 5])
def test_experts_without_neurons_are_refused(n_experts: int) -> None:
    for split in (lambda: contiguous(4, n_experts), lambda: by_weights(torch.eye(4), n_experts)):
        with pytest.raises(ValueError, match=f"the 4 neurons of a layer, got {n_experts}"):
            split()


def test_neurons_of_one_kind_come_together() -> None:
    kind_U = torch.arange(40).remainder(4)[torch.randperm(40)]
    weights_UP = torch.eye(4)[kind_U] * (1 + torch.rand(40, 1)) + 0.05 * torch.randn(40, 4)
    active_NU = (torch.arange(200).remainder(4)[:, None] == kind_U) * torch.rand(200, 40)
    for split_EF in (by_weights(weights_UP, 4), by_activations(active_NU, 4)):
        assert all(len(kind_U[neurons].unique()) == 1 for neurons in split_EF)


@pytest.mark.parametrize("n_of_kinds", [[20] * 8, [24, 22, 20, 20, 20, 18, 18, 18]])
def test_neurons_that_are_never_active_fill_experts_up(n_of_kinds: list[int]) -> None:
    """A third of the neurons is dead; the others keep together, also in groups of unlike sizes."""
    kinds = [kind for kind, n in enumerate(n_of_kinds) for _ in range(n)]
    kind_U = torch.tensor(kinds + [-1] * 80)[torch.randperm(240)]
    hidden_NU = (torch.arange(400).remainder(8)[:, None] == kind_U) * (0.5 + torch.rand(400, 240))
    split_EF = by_activations(hidden_NU, 8)
    assert is_balanced(split_EF, 240, 8)
    alive = [kind_U[neurons][kind_U[neurons] >= 0].unique() for neurons in split_EF]
    assert sorted(kind.tolist() for kind in alive) == [[kind] for kind in range(8)]


def test_layers_that_are_dead_or_nearly() -> None:
    hidden_NU = torch.zeros(9, 10)
    assert torch.equal(by_activations(hidden_NU, 3), contiguous(10, 3))
    hidden_NU[:, 4] = 1
    assert is_balanced(by_activations(hidden_NU, 3), 10, 3)


def test_assignment_is_balanced_and_stable() -> None:
    score_UE = torch.randn(60, 7)
    owner_U = balanced_assignment(score_UE)
    assert set(owner_U.bincount(minlength=7).tolist()) == {8, 9}
    wish_UE = score_UE - score_UE.mean(1, keepdim=True)
    own_U = wish_UE.gather(1, owner_U[:, None])[:, 0]
    for u in range(60):
        for e in range(7):
            better = wish_UE[u, e] > own_U[u]
            assert not (better and (own_U[owner_U == e] < wish_UE[u, e]).any())

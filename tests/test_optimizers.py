"""Muon for stacks of matrices, beside AdamW."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
from lightning_dsmoe.optimizers import MuonWithAdamW, orthogonalize
from lightning_dsmoe.training.optimization import parameter_groups

STEPS = 3
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


@pytest.fixture
def decoder() -> Decoder:
    return Decoder(
        11,
        8,
        1,
        attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4, bias=True),
        feed_forward=partial(MixtureOfExperts, n_experts=3, d_expert=5),
    )


def gradients(named: list[tuple[str, Tensor]]) -> list[list[Tensor]]:
    return [[torch.randn_like(parameter) for _, parameter in named] for _ in range(STEPS)]


def take_steps(
    optimizers: list[torch.optim.Optimizer], parameters: list[Tensor], each: list[list[Tensor]]
) -> None:
    for step in each:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(3, 4, 7), (2, 7, 4), (5, 5)])
def test_singular_values_become_about_one_and_vectors_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    in_their_bases = u.mT @ found @ v.mT
    diagonal = torch.diag_embed(in_their_bases.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(in_their_bases, diagonal, rtol=0, atol=1e-4)


def test_each_expert_is_a_matrix_and_the_rest_is_for_adamw(decoder: Decoder) -> None:
    """Against PyTorch's Muon, which computes in bfloat16, on a copy of every single matrix."""
    named = list(decoder.named_parameters())
    each = gradients(named)
    start = {name: parameter.detach().clone() for name, parameter in named}
    take_steps(
        [MuonWithAdamW(parameter_groups(decoder), betas=(0.9, 0.99), **OPTIONS)],
        [parameter for _, parameter in named],
        each,
    )
    hidden = {"w_in.weight", "w_out.weight", "w_q.weight", "w_o.weight", "kv.weight"}
    n_matrices = 0
    for at, (name, parameter) in enumerate(named):
        mine = [step[at] for step in each]
        if ".".join(name.split(".")[-2:]) in hidden:
            pieces, slices = list(start[name].reshape(-1, *start[name].shape[-2:])), []
            for index, piece in enumerate(pieces):
                matrix = nn.Parameter(piece.clone())
                grads = [[g.reshape(-1, *g.shape[-2:])[index]] for g in mine]
                muon = torch.optim.Muon([matrix], adjust_lr_fn="match_rms_adamw", **OPTIONS)
                take_steps([muon], [matrix], grads)
                slices.append(matrix.detach())
            expected = torch.stack(slices).view_as(parameter)
            n_matrices += len(slices)
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1.5e-3)
            assert (expected - start[name]).abs().mean() > 3e-3
        else:
            twin = nn.Parameter(start[name].clone())
            decay = 0.1 if twin.ndim >= 2 and "b_" not in name else 0.0
            adamw = torch.optim.AdamW([twin], lr=0.01, betas=(0.9, 0.99), weight_decay=decay)
            take_steps([adamw], [twin], [[g] for g in mine])
            assert torch.equal(parameter, twin), name
    assert n_matrices == 2 * 3 + 2 * 2 + 1


def test_goes_on_from_its_state(decoder: Decoder) -> None:
    named = list(decoder.named_parameters())
    each = gradients(named)
    twin = copy.deepcopy(decoder)
    make: Callable[[Decoder], MuonWithAdamW] = lambda d: MuonWithAdamW(parameter_groups(d))  # noqa: E731
    straight, before = make(decoder), make(twin)
    take_steps([straight], list(decoder.parameters()), each)
    take_steps([before], list(twin.parameters()), each[:1])
    after = make(twin)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    take_steps([after], list(twin.parameters()), each[1:])
    for found, expected in zip(twin.parameters(), decoder.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_without_names_or_with_a_wrong_momentum_it_is_refused() -> None:
    with pytest.raises(ValueError, match="give it parameter_groups"):
        MuonWithAdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="momentum must be in"):
        MuonWithAdamW(nn.Linear(2, 2).named_parameters(), momentum=1.0)

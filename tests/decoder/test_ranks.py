"""Two processes that train one decoder, densely and sparsely."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.routing import SelectionPlan, TopK

from ..ranks import on_two_ranks


def make_decoder() -> Decoder:
    torch.manual_seed(3)
    return Decoder(
        11,
        8,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=4),
        feed_forward=partial(MixtureOfExperts, n_experts=16, d_expert=3),
    )


def gradients(decoder: Decoder) -> dict[str, torch.Tensor]:
    assert all(p.grad is not None for p in decoder.parameters())
    return {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}


def run_rank(rank: int) -> list[dict[str, torch.Tensor]]:
    decoder = make_decoder()
    parallel = DistributedDataParallel(decoder)
    found = []
    for plan in (None, SelectionPlan(experts=TopK(1), attention=TopK(1))):
        decoder.zero_grad()
        parallel(
            torch.tensor([[1, 2, 3], [4, 5, 6]])[rank, None], plan
        ).logits.square().sum().backward()
        found.append(gradients(decoder))
    return found


@pytest.mark.ddp
def test_gradients_are_the_mean_over_ranks_with_every_parameter_used(tmp_path: Path) -> None:
    ranks = on_two_ranks(run_rank, tmp_path)
    decoder = make_decoder()
    (decoder(torch.tensor([[1, 2, 3], [4, 5, 6]])).logits.square().sum() / 2).backward()
    for found in ranks:
        torch.testing.assert_close(found[0], gradients(decoder))
    torch.testing.assert_close(ranks[0], ranks[1])
    dense, sparse = (g["blocks.0.feed_forward.experts.w_in.weight"] for g in ranks[0])
    assert dense.flatten(1).any(1).all()
    assert not sparse.flatten(1).any(1).all()
    assert sparse.any()

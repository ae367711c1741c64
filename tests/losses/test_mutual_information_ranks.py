"""The loss over two processes with different numbers of tokens."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dsmoe.losses import mutual_information_loss

from ..ranks import on_two_ranks

SHARES = ((0, 5), (5, 16))


def tokens_and_weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(16, 6, generator=generator)
    return x, 2 * torch.randn(4, 6, generator=generator)


def loss_of(x: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return mutual_information_loss((x @ weight.T).softmax(-1), x[:, 0] > -1, group=group)


def run_rank(rank: int) -> tuple[Tensor, Tensor]:
    x, weight = tokens_and_weight()
    weight.requires_grad_()
    start, end = SHARES[rank]
    loss = loss_of(x[start:end], weight, dist.group.WORLD)
    (gradient,) = torch.autograd.grad(loss, weight)
    dist.all_reduce(gradient)
    return loss.detach(), gradient / 2


@pytest.mark.ddp
def test_two_ranks_get_the_loss_and_gradient_of_one_process(tmp_path: Path) -> None:
    ranks = on_two_ranks(run_rank, tmp_path)
    x, weight = tokens_and_weight()
    weight.requires_grad_()
    loss = loss_of(x, weight, None)
    (gradient,) = torch.autograd.grad(loss, weight)
    for rank_loss, mean_gradient in ranks:
        torch.testing.assert_close(rank_loss, loss.detach())
        torch.testing.assert_close(mean_gradient, gradient)
    halves = [loss_of(x[start:end], weight, None) for start, end in SHARES]
    assert abs(sum(halves) / 2 - loss) > 1e-3

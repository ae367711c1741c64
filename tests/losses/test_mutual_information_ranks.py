"""The loss over two processes with different numbers of tokens."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lightning_dsmoe.losses import mutual_information_loss

SHARES = ((0, 5), (5, 16))


def tokens_and_weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(16, 6, generator=generator)
    return x, 2 * torch.randn(4, 6, generator=generator)


def loss_of(x: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return mutual_information_loss((x @ weight.T).softmax(-1), x[:, 0] > -1, group=group)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    x, weight = tokens_and_weight()
    weight.requires_grad_()
    start, end = SHARES[rank]
    loss = loss_of(x[start:end], weight, dist.group.WORLD)
    (gradient,) = torch.autograd.grad(loss, weight)
    dist.all_reduce(gradient)
    torch.save((loss.detach(), gradient / 2), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_ranks_get_the_loss_and_gradient_of_one_process(tmp_path: Path) -> None:
    mp.start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    x, weight = tokens_and_weight()
    weight.requires_grad_()
    loss = loss_of(x, weight, None)
    (gradient,) = torch.autograd.grad(loss, weight)
    for rank in range(2):
        rank_loss, mean_gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(rank_loss, loss.detach())
        torch.testing.assert_close(mean_gradient, gradient)
    halves = [loss_of(x[start:end], weight, None) for start, end in SHARES]
    assert abs(sum(halves) / 2 - loss) > 1e-3

"""Metrics over two processes with different numbers of tokens."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lightning_dsmoe.metrics import (
    ActiveParameters,
    ExpertUtilization,
    ParameterCounts,
    RoutedParameters,
)

E = 4
COUNTS = ParameterCounts(7, 10, (RoutedParameters(E, 5),), (None,))


def probs_of_all() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (3 * torch.randn(16, E, generator=generator)).softmax(-1)


def measure(probs: Tensor, sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    utilization, active = ExpertUtilization(E), ActiveParameters(COUNTS)
    for part in probs.split(sizes):
        utilization.update(part)
        active.update([part > 0.3], [None], torch.ones(len(part), dtype=torch.bool))
    return list(utilization.compute()), list(active.compute())


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    probs = probs_of_all()
    shares = {"uneven": (probs[:5], probs[5:]), "one empty": (probs[:0], probs)}
    measured = {
        name: measure(parts[rank], [len(parts[rank]) // 3, -(-2 * len(parts[rank]) // 3)])
        for name, parts in shares.items()
    }
    torch.save(measured, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_ranks_measure_as_one_process(tmp_path: Path) -> None:
    # One process imports everything and both ranks are forked from it.
    mp.set_forkserver_preload([run_rank.__module__])
    mp.start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    expected = measure(probs_of_all(), [16])
    for rank in range(2):
        measured = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert set(measured) == {"uneven", "one empty"}
        for values in measured.values():
            torch.testing.assert_close(values, expected)

"""Metrics over two processes with different numbers of tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.metrics import (
    ActiveParameters,
    ExpertUtilization,
    ParameterCounts,
    RoutedParameters,
)

from ..ranks import on_two_ranks

E = 4
COUNTS = ParameterCounts(7, 10, {"mlp": RoutedParameters(E, 5)})


def probs_of_all() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (3 * torch.randn(16, E, generator=generator)).softmax(-1)


def measure(probs: Tensor, sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    utilization, active = ExpertUtilization(E), ActiveParameters(COUNTS)
    for part in probs.split(sizes):
        utilization.update(part)
        active.update({"mlp": part > 0.3})
    return list(utilization.compute()), list(active.compute())


def run_rank(rank: int) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    probs = probs_of_all()
    shares = {"uneven": (probs[:5], probs[5:]), "one empty": (probs[:0], probs)}
    return {
        name: measure(parts[rank], [len(parts[rank]) // 3, -(-2 * len(parts[rank]) // 3)])
        for name, parts in shares.items()
    }


@pytest.mark.ddp
def test_two_ranks_measure_as_one_process(tmp_path: Path) -> None:
    ranks = on_two_ranks(run_rank, tmp_path)
    expected = measure(probs_of_all(), [16])
    for measured in ranks:
        assert set(measured) == {"uneven", "one empty"}
        for values in measured.values():
            torch.testing.assert_close(values, expected)

"""Ranks with more batches than others, as one of them is told."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_dsmoe.training.same_batches import check_same_batches

VALIDATION = "an epoch has 2 validation batches on rank 1 and 3 on rank 0, which would wait"


@pytest.mark.parametrize(
    ("strategy", "other", "refused"),
    [
        (DDPStrategy(), (4, [1, 3]), ""),
        (DDPStrategy(), (4, [1, 2]), ""),
        (DDPStrategy(), (5, [1, 3]), "4 training batches on rank 0 and 5 on rank 1"),
        (ModelParallelStrategy(), (4, [1, 3]), ""),
        (ModelParallelStrategy(), (4, [1, 2]), VALIDATION),
        (ModelParallelStrategy(), (3, [1, 2]), "3 training batches on rank 1"),
    ],
)
def test_only_what_would_wait_is_refused(
    strategy: Any, other: tuple[int, list[int]], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(into: list[Any], mine: list[Any]) -> None:
        numbers = [other[0], *other[1]]
        into[:] = [mine, [(kind, n) for (kind, _), n in zip(mine, numbers, strict=False)]]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    trainer: Any = SimpleNamespace(
        world_size=2, strategy=strategy, num_training_batches=4, num_val_batches=[1, 3]
    )
    if not refused:
        check_same_batches(trainer)
        return
    with pytest.raises(ValueError, match=refused):
        check_same_batches(trainer)

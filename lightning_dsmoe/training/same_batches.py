"""As many training batches on each rank, or one line that says which ranks have how many."""

from typing import Any

import torch.distributed as dist
from lightning import Trainer


def check_same_batches(trainer: Trainer) -> None:
    """Refuse to train where a rank would run out of batches, and the others wait for it.

    Call on all ranks. Lengths that no loader tells, as of a stream, are not checked.

    Args:
        trainer: about to train.

    Raises:
        ValueError: on each rank, if an epoch has more batches on one than on another.
    """
    if trainer.world_size == 1 or not dist.is_initialized():
        return
    numbers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, trainer.num_training_batches)
    fewest, most = min(numbers), max(numbers)
    if fewest != most:
        raise ValueError(
            f"an epoch has {fewest} training batches on rank {numbers.index(fewest)} and {most} on "
            f"rank {numbers.index(most)}, which would wait for it: give all ranks as many, as "
            "TextDataModule and Lightning's DistributedSampler do"
        )

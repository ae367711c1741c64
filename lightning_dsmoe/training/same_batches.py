"""As many batches on each rank, or one line that says which ranks have how many."""

from typing import Any

import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy


def check_same_batches(trainer: Trainer) -> None:
    """Refuse to train where a rank would run out of batches, and the others wait for it.

    Call on all ranks. Validation counts where weights are sharded, since each forward pass gathers
    them then; elsewhere ranks meet at its end. Lengths that no loader tells, as of a stream, are
    not checked.

    Args:
        trainer: about to train.

    Raises:
        ValueError: on each rank, if an epoch has more batches on one than on another.
    """
    if trainer.world_size == 1 or not dist.is_initialized():
        return
    mine = [("training", trainer.num_training_batches)]
    if isinstance(trainer.strategy, ModelParallelStrategy):
        mine += [("validation", number) for number in trainer.num_val_batches]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    for loader in zip(*of_ranks, strict=True):
        numbers = [number for _, number in loader]
        fewest, most = min(numbers), max(numbers)
        if fewest != most:
            raise ValueError(
                f"an epoch has {fewest} {loader[0][0]} batches on rank {numbers.index(fewest)} and "
                f"{most} on rank {numbers.index(most)}, which would wait for it: give all ranks as "
                "many, as TextDataModule and Lightning's DistributedSampler do"
            )

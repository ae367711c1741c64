"""Work that one rank does while the others wait."""

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from lightning import Trainer

_NO_LIMIT = timedelta(days=3650)


def on_rank_zero(trainer: Trainer, work: Callable[[], None]) -> None:
    """Do on rank zero what may take long, and return on every rank when it is done.

    Call on all ranks. The work must not communicate: the other ranks take no part in it.

    A collective of the default group gives up after its time limit, 10 minutes with NCCL, so the
    others wait in a group of their own; as in Lightning's `prepare_data`, its backend is Gloo, the
    only one that takes a limit of any length.

    Args:
        trainer: whose ranks wait.
        work: what rank zero does.

    Raises:
        RuntimeError: on the other ranks if it failed on rank zero, which raises its own error.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if trainer.is_global_zero:
            work()
        trainer.strategy.barrier()
        return
    group = dist.new_group(backend="gloo", timeout=_NO_LIMIT)
    failure: list[str | None] = [None]
    try:
        if trainer.is_global_zero:
            try:
                work()
            except BaseException as error:
                failure = [str(error) or type(error).__name__]
                raise
    finally:
        # Also after a failure, which the other ranks would wait for in vain.
        dist.broadcast_object_list(failure, src=0, group=group)
        dist.destroy_process_group(group)
    if failure[0] is not None:
        raise RuntimeError(f"rank 0: {failure[0]}")

"""Which of Lightning's strategies are supported, and how a decoder is sharded."""

import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_dsmoe.decoder import Decoder

_SUPPORTED = strategies.SingleDeviceStrategy, strategies.DDPStrategy, ModelParallelStrategy
_DERIVED = strategies.DeepSpeedStrategy, XLAStrategy
"""Subclasses of `DDPStrategy` that are not supported."""


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which several processes are not known to train as one would.

    FSDP1 flattens parameters, so that weight decay takes matrices for vectors; DeepSpeed averages
    and clips gradients by itself; under XLA ranks cannot share the sums of the losses.

    Raises:
        ValueError: if it is another than one process, DDP or FSDP2, or has tensor parallelism, or
            if a callback averages weights that are sharded.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, _DERIVED) or not isinstance(strategy, _SUPPORTED):
        raise ValueError(
            f"{name} is not supported; use one device, DDPStrategy or, to shard the model, "
            "ModelParallelStrategy with tensor_parallel_size=1"
        )
    if isinstance(strategy, ModelParallelStrategy):
        size = strategy.device_mesh["tensor_parallel"].size()
        if size != 1:
            raise ValueError(
                f"{name} with tensor_parallel_size={size} is not supported; set it to 1 and "
                "data_parallel_size to the number of processes"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} cannot average the sharded weights of {name}; "
                    "use DDPStrategy"
                )


def shard(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Shard parameters, gradients and optimizer states over a mesh with FSDP2, once.

    Each block is gathered when it runs; embeddings, last norm and head stay gathered from the
    forward to the backward pass.

    Args:
        decoder: the decoder, changed in place.
        mesh: one dimension of processes, each with its own batches.
    """
    if isinstance(decoder, FSDPModule):
        return
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(decoder, mesh=mesh)


def data_parallel_group(mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The processes that train on different batches; None for a single process.

    Args:
        mesh: the device mesh of a strategy that shards, else None.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.group.WORLD if mesh is None else mesh["data_parallel"].get_group()

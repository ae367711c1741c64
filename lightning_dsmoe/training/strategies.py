"""Which of Lightning's strategies are supported, and how a decoder is sharded."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lightning_dsmoe.decoder import Decoder

_SUPPORTED = strategies.SingleDeviceStrategy, strategies.DDPStrategy, ModelParallelStrategy
_DERIVED = strategies.DeepSpeedStrategy, XLAStrategy
"""Subclasses of `DDPStrategy` that are not supported."""
_STACK = 3  # axes of the weights of all experts
_SHOWN = 3


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
        name = ModelParallelStrategy.__name__  # as it was given
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


def shard(decoder: Decoder, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard parameters, gradients and optimizer states over a mesh with FSDP2, once.

    Each block is gathered when it runs, and so are embeddings and, with the last norm, the head.
    Where the head shares the weights of the embeddings, they stay gathered from the forward to the
    backward pass. What else there is, such as learned positions, does too.

    Args:
        decoder: the decoder, changed in place; its blocks are compiled before.
        mesh: one dimension of processes, each with its own batches.
        policy: types of what is gathered and reduced.
    """
    if isinstance(decoder, FSDPModule):
        return

    def placement(parameter: nn.Parameter) -> Shard | None:
        return stack_placement(parameter.shape, mesh.size())

    one = partial(fully_shard, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    for block in decoder.blocks:
        one(block)
    if not decoder.tie_embeddings:
        one(decoder.embedding)
        # The backward pass begins with it, so it would be gathered again at once.
        one([decoder.norm, decoder.head], reshard_after_forward=False)
    one(decoder)


def stack_placement(shape: Sequence[int], n_ranks: int) -> Shard | None:
    """Along which axis a stack of matrices is sharded; None for FSDP2's own choice, the first.

    The first axis of stacked weights are the experts. Where these cannot be dealt out evenly, FSDP2
    pads them: 12 experts are held and sent as 16 on 8 ranks, and 4 as 8. Rows are dealt out then,
    which FSDP2 does only evenly.

    Args:
        shape: of a parameter.
        n_ranks: number of processes.

    Examples:
        >>> from lightning_dsmoe.training.strategies import stack_placement
        >>> stack_placement((8, 64, 16), 8) is None
        True
        >>> stack_placement((12, 64, 16), 8)
        Shard(dim=1)
    """
    uneven = len(shape) == _STACK and shape[0] % n_ranks != 0
    return Shard(1) if uneven and shape[1] % n_ranks == 0 else None


def precision_policy(trainer: Trainer) -> MixedPrecisionPolicy:
    """Types that FSDP2 gathers and reduces in, so that a run rounds where one process rounds.

    Under "mixed" precision autocast casts each product by itself, from weights in float32, which
    routers, norms and the residual stream need: nothing is cast for them here. Under "true" half
    precision gradients are half too, and their mean over ranks is taken in float32.

    Args:
        trainer: has the precision of the run.
    """
    is_half = isinstance(trainer.precision_plugin, HalfPrecision)
    return MixedPrecisionPolicy(
        reduce_dtype=torch.float32 if is_half else None, cast_forward_inputs=False
    )


def check_sharded(module: nn.Module) -> None:
    """Refuse parameters that would be trained on each rank by itself.

    Raises:
        ValueError: if a parameter is not sharded, with its name.
    """
    whole = [name for name, p in module.named_parameters() if not isinstance(p, DTensor)]
    if whole:
        raise ValueError(
            "ModelParallelStrategy trains sharded parameters only, and these are outside the "
            f"decoder: {', '.join(whole[:_SHOWN])}{' and others' * (len(whole) > _SHOWN)}; call "
            "fully_shard on their modules in configure_model, before super().configure_model(), or "
            "use DDPStrategy"
        )


def data_parallel_group(mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The processes that train on different batches; None for a single process.

    Args:
        mesh: the device mesh of a strategy that shards, else None.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.group.WORLD if mesh is None else mesh["data_parallel"].get_group()

"""Memory, communication and time of a training step on many GPUs."""

from math import ceil, prod
from typing import NamedTuple

import torch

from benchmarks.scale.counts import Counts
from lightning_dsmoe.peak_flops import peak_flops
from lightning_dsmoe.training.strategies import stack_placement

GPUS_OF_A_NODE = 8
KERNELS = 0.6
"""Share of a card's dense peak that its kernels reach while it computes: an assumption."""
LINKS = 0.8
"""Share of a link's published speed that collectives reach: an assumption."""
FLOAT32 = 4
ADAMW_STATES = 2 * FLOAT32


class Gpu(NamedTuple):
    """A card and its links, one way, in bytes and bytes per second."""

    name: str
    memory: float
    nvlink: float
    infiniband: float


GPUS = {
    # NVIDIA's data sheets give NVLink for both ways together: 900 GB/s of an H100 SXM and an H200,
    # 600 GB/s of an A100 SXM. InfiniBand is that of its DGX: 8 ConnectX-7 of 400 Gb/s for 8 cards
    # of a DGX H100 or H200 (data sheet of each), 8 ConnectX-6 of 200 Gb/s in a DGX A100.
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80e9, 450e9, 50e9),
    "h200": Gpu("NVIDIA H200", 141e9, 450e9, 50e9),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80e9, 300e9, 25e9),
}


class Traffic(NamedTuple):
    """What collectives of one optimizer step are given or give, in bytes of whole tensors."""

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0

    def per_gpu(self, gpus: int) -> float:
        """Bytes that each GPU sends in a ring; an all-reduce goes around it twice."""
        around = 2 * self.all_reduce + self.all_gather + self.reduce_scatter
        return around * (gpus - 1) / gpus


def accumulation(counts: Counts, gpus: int) -> int:
    """Batches of a step on each GPU: the configuration's on all together, but at least one."""
    return max(1, counts.accumulate // gpus)


def ddp_traffic(counts: Counts, gpus: int) -> Traffic:
    """Gradients once a step, and the sums of the losses in each batch."""
    sums = accumulation(counts, gpus) * counts.router_sums
    return Traffic(all_reduce=FLOAT32 * (counts.parameters + sums))


def fsdp2_traffic(counts: Counts, gpus: int, gathered: int = FLOAT32) -> Traffic:
    """In each batch all blocks twice, the rest once, all gradients, and the sums of the losses.

    Lightning 2.6.6 lets FSDP2 reduce the gradients of every accumulated batch.

    Args:
        counts: the model.
        gpus: number of GPUs.
        gathered: bytes of a weight as it is gathered.
    """
    batches = accumulation(counts, gpus)
    outside, *blocks = (sum(padded(shape, gpus) for shape in unit) for unit in counts.units)
    return Traffic(
        batches * FLOAT32 * counts.router_sums,
        batches * gathered * (outside + 2 * sum(blocks)),
        batches * FLOAT32 * (outside + sum(blocks)),
    )


def padded(shape: torch.Size, gpus: int) -> int:
    """Numbers of a parameter in equal shards, as FSDP2 sends them.

    Shards are along the first axis, padded to be equal: 32 experts on 1,024 GPUs are sent as 1,024.
    Stacks whose experts do not come out even are sharded along their rows, where these do.
    """
    if stack_placement(shape, gpus) is not None:
        return prod(shape)
    return ceil(shape[0] / gpus) * gpus * prod(shape[1:])


def memory(counts: Counts, gpus: int, *, sharded: bool, recompute: bool) -> float:
    """Bytes of a GPU at most: weights, gradients, AdamW, activations, and what is gathered.

    Args:
        counts: the model.
        gpus: number of GPUs.
        sharded: FSDP2 rather than DDP.
        recompute: with activation checkpointing.
    """
    activations = counts.kept_checkpointed if recompute else counts.kept
    each = 2 * FLOAT32 + ADAMW_STATES
    if not sharded:
        # DDP copies gradients into buckets of its own.
        return (each + FLOAT32) * counts.parameters + activations
    outside, *blocks = (sum(padded(shape, gpus) for shape in unit) for unit in counts.units)
    # What is gathered: all outside of the blocks, a block, the next one ahead, and its gradients.
    gathered = FLOAT32 * (outside + 3 * max(blocks))
    return each * (outside + sum(blocks)) / gpus + gathered + activations


class Expected(NamedTuple):
    """Share of the peak that the model's operations are, if communication hides or does not."""

    hidden: float
    exposed: float


def mfu(
    counts: Counts, gpu: Gpu, gpus: int, traffic: Traffic, *, recompute: bool, sharded: bool
) -> Expected:
    """Model FLOPs utilization of a step, from the times of computing and of communication.

    Latency, data, the optimizer and waiting for the slowest rank are left out, so that it is an
    upper bound.
    """
    peak = peak_flops(gpu.name, torch.bfloat16)
    assert peak is not None
    batches = accumulation(counts, gpus)
    again = counts.recomputed_flops if recompute else 0.0
    computing = batches * (counts.flops + again) / (peak * KERNELS)
    link = gpu.nvlink if gpus <= GPUS_OF_A_NODE else gpu.infiniband
    sending = traffic.per_gpu(gpus) / (LINKS * link)
    # DDP sends during the backward pass of the last batch of a step, FSDP2 at any time.
    behind = computing if sharded else computing * 2 / 3 / batches
    useful = batches * counts.flops / peak
    hidden = computing + max(0.0, sending - behind)
    return Expected(useful / hidden, useful / (computing + sending))

"""What a model and its caches take of a GPU, and what would fit where they do not."""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import nn

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights

_GB = 1e9
_HALF = 2  # bytes
_SCALE = 4  # bytes
_FEWEST_FOR_BFLOAT16 = 8, 0  # compute capability


class Numbers(NamedTuple):
    """How many numbers of each kind there are in memory.

    Args:
        experts: weights that 8 bits can store.
        rows: rows of them, which then have a scale each.
        others: all other weights.
        cache: keys and values.
    """

    experts: int
    rows: int
    others: int
    cache: int

    def bytes_in(self, size: int, *, int8: bool) -> int:
        """Bytes of all of them.

        Args:
            size: bytes of a floating-point number.
            int8: whether the weights of experts are in 8 bits.

        Examples:
            >>> Numbers(1000, 10, 50, 200).bytes_in(2, int8=True)
            1540
        """
        experts = self.experts + _SCALE * self.rows if int8 else size * self.experts
        return experts + size * (self.others + self.cache)


def numbers_of(decoder: Decoder, n_sequences: int, capacity: int) -> Numbers:
    """The numbers of a packed decoder with a cache of `capacity` positions a sequence."""
    modules = list(decoder.modules())
    routed: list[nn.Module] = []
    routed += [each.experts for each in modules if isinstance(each, MixtureOfExperts)]
    routed += [each.heads for each in modules if isinstance(each, MixtureOfAttentionHeads)]
    weights = [w.weight for m in routed for w in m.children() if isinstance(w, RowMajorWeights)]
    stored = {t.data_ptr(): t for t in [*decoder.parameters(), *decoder.buffers()]}
    experts = sum(weight.numel() for weight in weights)
    rows = sum(weight.shape[:2].numel() for weight in weights)
    scales = sum(tensor.numel() for name, tensor in decoder.named_buffers() if "scales" in name)
    layers = [block.attention for block in cast(Iterable[Block], decoder.blocks)]
    channels = sum(2 * layer.n_kv_heads * layer.d_head for layer in layers)
    others = sum(tensor.numel() for tensor in stored.values()) - experts - scales
    return Numbers(experts, rows, others, channels * n_sequences * capacity)


def advice(
    numbers: Numbers, room: int, *, size: int, int8: bool, half: torch.dtype = torch.bfloat16
) -> str:
    """One sentence: what is needed, what there is, and what would fit.

    A plan changes nothing about it: every expert is in memory, whichever run.

    Args:
        numbers: what has to be in memory.
        room: bytes free or taken by these numbers already.
        size: bytes of a floating-point number now.
        int8: whether the weights of experts are in 8 bits now.
        half: the type of 16 bits that the GPU computes in.

    Examples:
        >>> model = Numbers(6_000_000_000, 10_000_000, 400_000_000, 100_000_000)
        >>> advice(model, 12_000_000_000, size=2, int8=False)
        "13.0 GB are needed and 12.0 GB there; quantization='int8' needs 7.0 GB"
        >>> advice(model, 3_000_000_000, size=2, int8=True)
        '7.0 GB are needed and 3.0 GB there; no type fits: try fewer or shorter sequences'
    """
    halves, eights = f".to({half})", "quantization='int8'"
    ways: list[tuple[str, int, bool]] = []
    if size > _HALF:
        ways.append((halves, _HALF, int8))
    if not int8:
        ways.append((eights, size, True))
    if size > _HALF and not int8:
        ways.append((f"{halves} with {eights}", _HALF, True))
    needs = [(way, numbers.bytes_in(some, int8=eight)) for way, some, eight in ways]
    fitting = [f"{way} needs {need / _GB:.1f} GB" for way, need in needs if need <= room]
    needed = numbers.bytes_in(size, int8=int8)
    fits_now = needed <= room
    beside, found = (" beside what kernels take", "") if fits_now else ("", "no type fits: ")
    fits = fitting[0] if fitting else f"{found}try fewer or shorter sequences"
    return f"{needed / _GB:.1f} GB are needed{beside} and {room / _GB:.1f} GB there; {fits}"


def what_would_fit(decoder: Decoder, n_sequences: int, capacity: int, free: int) -> str:
    """That sentence for a packed decoder whose weights are in memory, and its cache not yet.

    Args:
        decoder: the decoder.
        n_sequences: sequences of the cache.
        capacity: positions a sequence.
        free: bytes that are free.
    """
    numbers = numbers_of(decoder, n_sequences, capacity)
    size = torch.finfo(decoder.embedding.weight.dtype).bits // 8
    int8 = any(buffer.dtype == torch.int8 for buffer in decoder.buffers())
    in_memory = numbers._replace(cache=0).bytes_in(size, int8=int8)
    half = half_of(decoder.embedding.weight.device)
    return "out of memory: " + advice(numbers, free + in_memory, size=size, int8=int8, half=half)


def half_of(device: torch.device) -> torch.dtype:
    """The type of 16 bits for a device: float16 on GPUs that do not compute in bfloat16."""
    is_old = device.type == "cuda" and (
        torch.cuda.get_device_capability(device) < _FEWEST_FOR_BFLOAT16
    )
    return torch.float16 if is_old else torch.bfloat16

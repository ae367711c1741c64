"""Packed models in the engine, as readers of sequences, for `python -m benchmarks.gpu`.

Shapes: B sequences, T tokens.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.sides import made_on
from benchmarks.timing import seconds_per_call
from lightning_dsmoe import Decoder, SelectionPlan
from lightning_dsmoe.inference import SwitchPoints
from lightning_dsmoe.inference.engine.batched import gpu_costs
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.weights.packing import Quantization, pack
from lightning_dsmoe.inference.engine.weights.row_major import Int8RowMajorWeights, RowMajorWeights

MAX_TOKENS = 16384
"""Tokens of prompts that are read at once."""
Way = Literal["by itself", "masked", "grouped"]
"""As the engine chooses, all experts on all tokens, or each expert on its own, cost what it may."""
_POINTS = {
    "by itself": SwitchPoints(),
    "masked": SwitchPoints(0, 2**31),
    "grouped": SwitchPoints(0, 1),
}


def packed_on(
    device: torch.device, make: Callable[[], Decoder], quantization: Quantization | None = None
) -> Decoder:
    """A decoder in bfloat16 whose weights lie as decoding reads them; 8 bits need no package."""
    decoder = made_on(device, make).bfloat16().eval().requires_grad_(False)
    pack(decoder, quantization=quantization, quantizer=rounded_to_int8)
    return decoder


def rounded_to_int8(weights: RowMajorWeights) -> Int8RowMajorWeights:
    """Codes and scales in the format of bitsandbytes, and almost its very codes."""
    rows = weights.weight.float()
    scales = rows.abs().amax(-1)
    codes = (rows * (127 / scales.clamp_min(1e-30))[..., None]).round().to(torch.int8)
    return Int8RowMajorWeights(
        codes, scales, transposed=weights.transposed, dtype=weights.weight.dtype
    )


class Kept:
    """A packed decoder, made when it is first needed.

    Args:
        device: where.
        make: makes the decoder.
        quantization: of its routed experts.
    """

    def __init__(
        self,
        device: torch.device,
        make: Callable[[], Decoder],
        quantization: Quantization | None = None,
    ) -> None:
        self._make = partial(packed_on, device, make, quantization)
        self._made: Decoder | None = None

    @property
    def decoder(self) -> Decoder:
        """The decoder."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def forget(self) -> None:
        """Make room; it is made anew when it is needed again."""
        self._made = None


class EngineReader:
    """Reads sequences with the engine.

    Args:
        decoder: the packed decoder.
        plan: the experts that run.
        capacity: most tokens of a sequence.
        way: how many tokens run the experts.
    """

    def __init__(
        self, decoder: Decoder, plan: SelectionPlan, capacity: int, *, way: Way = "by itself"
    ) -> None:
        self.engine = Engine(decoder, _POINTS[way], max_tokens=MAX_TOKENS)
        self._plan, self._capacity, self._way = plan, capacity, way

    def start(self, prompt_BT: Tensor) -> None:
        """Forget everything and read prompts."""
        self._context = None  # whose memory the next one needs
        self._context = self.engine.open(len(prompt_BT), self._capacity, self._plan)
        with self._costs():
            self._context.read(prompt_BT)

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Read one token more of each sequence and give the most probable one after it, `[B]`."""
        assert self._context is not None
        with self._costs():
            return self._context.read(tokens_B1).argmax(-1)

    def _costs(self) -> AbstractContextManager[object]:
        if self._way != "grouped":
            return nullcontext()
        return mock.patch.object(gpu_costs, "grouping_pays", return_value=True)


def host_waits(action: Callable[[], object], device: torch.device) -> int | None:
    """How often an action waits for the GPU, the fewer of two times; None on a CPU.

    One of two turns of decoding may have to read the prompts anew.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    counts = [0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(2):
                action()
                counts.append(
                    sum("synchronizing CUDA operation" in str(each.message) for each in said)
                )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return min(counts[1], counts[2] - counts[1])


def copy_bandwidth(device: torch.device, *, n_bytes: int = 2**30, rounds: int = 20) -> float:
    """Bytes a second that a copy within the memory of a device reads and writes."""
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = math.inf
    for _ in range(rounds):
        seconds = min(seconds, seconds_per_call(lambda: target.copy_(source), 5))
    return 2 * n_bytes / seconds

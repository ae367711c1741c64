"""Bytes by hand, and what is recommended."""

import pytest
import torch

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.cache import empty_slots
from lightning_dsmoe.inference.engine.decode_cuda.memory import (
    Numbers,
    advice,
    half_of,
    numbers_of,
    what_would_fit,
)
from lightning_dsmoe.inference.engine.weights.packing import pack
from lightning_dsmoe.routing import routed_layers

from ..conftest import packed

GB = 1_000_000_000
MODEL = Numbers(experts=4 * GB, rows=GB // 100, others=GB, cache=GB)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_in_memory(int8: bool, dtype: torch.dtype, decoder: Decoder) -> None:
    pack(decoder.requires_grad_(False), quantization="int8" if int8 else None)
    twin = decoder.to(dtype)
    in_codes = any(buffer.dtype == torch.int8 for buffer in twin.buffers())
    assert in_codes == (int8 and bool(routed_layers(twin)))
    slots = empty_slots(twin, 3, 100)
    tensors = {t.data_ptr(): t for t in [*twin.parameters(), *twin.buffers()]}
    held = sum(t.nbytes for t in tensors.values())
    held += sum(t.nbytes for t in (*slots.keys, *slots.values))
    assert numbers_of(twin, 3, 100).bytes_in(dtype.itemsize, int8=int8) == held


@pytest.mark.parametrize(
    ("size", "int8", "room", "expected"),
    [
        (4, False, 20, r"24.0 GB are needed and 20.0 GB there; .to(torch.bfloat16) needs 12.0 GB"),
        (4, False, 12.04, r"24.0 GB are needed and 12.0 GB there; .to(torch.bfloat16) needs 12.0"),
        (4, False, 9, "; .to(torch.bfloat16) with quantization='int8' needs 8.0 GB"),
        (4, True, 9, "12.0 GB are needed and 9.0 GB there; .to(torch.bfloat16) needs 8.0 GB"),
        (2, False, 9, "12.0 GB are needed and 9.0 GB there; quantization='int8' needs 8.0 GB"),
        (2, False, 8, "no type fits: try fewer or shorter sequences"),
        (2, True, 7, "8.0 GB are needed and 7.0 GB there; no type fits"),
        (2, True, 9, "8.0 GB are needed beside what kernels take and 9.0 GB there; try fewer or"),
    ],
)
def test_what_is_recommended(size: int, int8: bool, room: float, expected: str) -> None:
    assert expected in advice(MODEL, int(room * GB), size=size, int8=int8)


def test_a_gpu_is_told_of_a_type_that_it_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "; .to(torch.float16) needs 12.0 GB"
    assert message in advice(MODEL, 12 * GB, size=4, int8=False, half=torch.float16)
    for capability, half in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, it=capability: it)
        assert half_of(torch.device("cuda")) == half
        assert half_of(torch.device("cpu")) == torch.bfloat16


def test_weights_in_memory_count_as_room(one_decoder: Decoder) -> None:
    twin = packed(one_decoder).float()
    found = what_would_fit(twin, 1000, 100_000, 10 * GB)
    assert found.startswith("out of memory: 25.6 GB are needed and 10.0 GB there; ")
    assert found.endswith("no type fits: try fewer or shorter sequences")

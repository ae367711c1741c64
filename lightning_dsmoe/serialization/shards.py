"""Weights in safetensors files of at most 5 GB, tensor by tensor.

`safetensors.save_file` needs all tensors of a file at once, a copy of a model that has one file. A
file is a header of JSON and then the bytes of its tensors, so each is written and let go.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.serialization.tensor_files import DTYPES, INDEX, SINGLE

MAX_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Part(NamedTuple):
    """Tensors of a file that are made together, from one tensor of ours.

    Args:
        empty: the tensors on the meta device, by their names.
        make: gives them with their values, in the same order.
    """

    empty: dict[str, Tensor]
    make: Callable[[], Iterable[Tensor]]

    @property
    def n_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.empty.values())


def write_shards(
    folder: Path,
    parts: Iterable[Part],
    *,
    max_bytes: int = MAX_BYTES,
    on_bytes: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with an index.

    Args:
        folder: where they go.
        parts: all tensors; a file has whole parts, so a part beyond the limit has a larger file.
        max_bytes: most bytes of tensors in a file.
        on_bytes: called after every part with the number of bytes that it added.
    """
    shards: list[list[Part]] = []
    room = -1
    for part in parts:
        if (room := room - part.n_bytes) < 0:
            shards.append([])
            room = max_bytes - part.n_bytes
        shards[-1].append(part)
    names = [SINGLE]
    if len(shards) > 1:
        total = len(shards)
        names = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
        weight_map = {
            tensor: name
            for name, shard in zip(names, shards, strict=True)
            for part in shard
            for tensor in part.empty
        }
        n_bytes = sum(part.n_bytes for shard in shards for part in shard)
        index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, on_bytes)


def _write_file(path: Path, parts: list[Part], on_bytes: Callable[[int], None]) -> None:
    # Wide types first, so that every tensor begins at a multiple of the size of its numbers.
    parts = sorted(parts, key=lambda part: -max(t.itemsize for t in part.empty.values()))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        for name, tensor in part.empty.items():
            start, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for (name, empty), tensor in zip(part.empty.items(), part.make(), strict=True):
                if tensor.shape != empty.shape or tensor.dtype != empty.dtype:
                    raise AssertionError(f"{name} is {tuple(tensor.shape)}, {tensor.dtype}")
                plain = tensor.detach().cpu().contiguous()
                file.write(plain.flatten().view(torch.uint8).numpy().data)
            on_bytes(part.n_bytes)

"""The safetensors files of a directory, of unknown origin, read one tensor at a time.

Every header is checked against the bytes of its file before memory is taken. Tensors are read and
not mapped: the pages of a mapped file would count as memory until the whole file is closed.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short_repr
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.files import read_json
from lightning_dsmoe.reading import Bounds, check_json, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""As safetensors themselves allow."""
_MAX_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_EXTENT = Annotated[int, Bounds(0, 2**53 - 1)]
_TENSOR = {
    "dtype": str,
    "shape": Annotated[list[_EXTENT], Bounds(0, _MAX_DIMENSIONS)],
    "data_offsets": tuple[_EXTENT, _EXTENT],
}


class StoredTensor(NamedTuple):
    """Where a tensor is, and its shape and type."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Its values, in memory of their own."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if tensor.numel():
            with self.path.open("rb") as file:
                file.seek(self.offset)
                memory = tensor.flatten().view(torch.uint8).numpy().data
                if file.readinto(memory) != tensor.nbytes:
                    raise ValueError(f"{self.path} was cut while it was read")
        return tensor


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a directory by name, from one file or from those of its index.

    Raises:
        FileNotFoundError: if there are no safetensors.
        ValueError: if a file is not whole or not what it should be, listing all problems.
    """
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():
        files, where = [_single_file(directory)], None
    else:
        where = _read_index(directory / INDEX)
        files = sorted(set(where.values()))
    for name in files:
        try:
            found = read_header(directory / name)
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
            continue
        if where is not None:
            problems += [f"{key} is not in the index" for key in found if key not in where]
            lost = [key for key, file in where.items() if file == name and key not in found]
            problems += [f"{key} is not in {name}, where the index says it is" for key in lost]
        tensors |= found
    if problems:
        raise ValueError(f"{directory}: {listed(problems)}")
    return tensors


def listed(problems: list[str], most: int = 20) -> str:
    """Problems in one line, the first of them if there are many."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, or its header does not match its bytes.
    """
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else n_bytes
        if size > min(MAX_HEADER_BYTES, n_bytes - 8):
            if head.startswith((b"PK", b"\x80")):
                raise ValueError(
                    "it is a pickle, which can run code when it is read; only safetensors are read"
                )
            raise ValueError("it is not a whole safetensors file: its header ends beyond the file")
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not a safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("it is not a safetensors file: its header is no object")
    header.pop("__metadata__", None)
    return _checked(path, header, start=8 + size, n_bytes=n_bytes)


def _checked(
    path: Path, header: Mapping[str, object], start: int, n_bytes: int
) -> dict[str, StoredTensor]:
    tensors, spans = {}, []
    for name, fields in header.items():
        entry = check_json(short_repr(name), fields, _TENSOR)
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{name!r:.200} is {shown(entry['dtype'])}, allowed are {', '.join(DTYPES)}"
            )
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r:.200} of shape {shape} does not take {end - begin} bytes")
        spans.append((begin, end))
        tensors[name] = StoredTensor(path, start + begin, shape, dtype)
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    # Tensors that overlap would take more memory than the file has bytes.
    if any(begin != before for (begin, _), before in zip(spans, ends, strict=False)):
        raise ValueError("its tensors do not follow one another")
    if start + ends[-1] != n_bytes:
        raise ValueError(f"its tensors end at byte {start + ends[-1]}, the file at {n_bytes}")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{path} is not an index: it needs a weight_map of names to files")
    outside = sorted({short_repr(file) for file in where.values() if not _is_plain_name(file)})
    if outside:
        raise ValueError(
            f"{path} names files that are no safetensors of its folder: {listed(outside)}"
        )
    return where


def _is_plain_name(name: object) -> bool:
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        return False
    return not set(name) & set("/\\:\0") and len(name) <= 255


def _single_file(directory: Path) -> str:
    """Name of the only file of a directory that has no index."""
    if (directory / SINGLE).is_file():
        return SINGLE
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    pickles = sorted({path.name for pattern in _PICKLES for path in directory.glob(pattern)})
    if others:
        why = f"but {listed(others, 3)} without {INDEX}, which says what is in which file"
    elif pickles:
        why = (
            f"but only {listed(pickles, 3)}: a pickle can run code when it is read, so only "
            "safetensors are; transformers converts it: from_pretrained, then save_pretrained"
        )
    else:
        why = "and no other weights"
    raise FileNotFoundError(f"no {SINGLE} in {directory}, {why}")

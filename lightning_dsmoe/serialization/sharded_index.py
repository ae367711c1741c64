"""The index of a checkpoint that `torch.distributed.checkpoint` wrote, read as data.

The index is a pickle of torch's own classes, which torch reads without any limit. Here it is
unpickled into stand-ins for those classes, which do nothing, and its names and sizes are checked
before any of them is used: a stranger's index runs no code, and no tensor is made for it.
"""

import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.reading import shown

_FOLDERS_OF_DATA = re.compile(r"state_dict|optimizer_\d+")
_MOST = 2**63
Sizes = tuple[int, ...]


class Place(NamedTuple):
    """Where a shard is, with the names that torch's reader of files knows.

    Args:
        relative_path: name of a file in the folder.
        offset: first byte of the shard, which is a file of `torch.save` by itself.
        length: its number of bytes.
        transform_descriptors: how bytes were compressed; they never are.
    """

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


class Shard(NamedTuple):
    """A part of a tensor; of a value that is no tensor, all of it, with no offsets and sizes."""

    offsets: Sizes
    sizes: Sizes
    place: Place


class Entry(NamedTuple):
    """A value in a folder: where it belongs, and its shards; type and size of a tensor."""

    path: tuple[str | int, ...]
    shards: tuple[Shard, ...]
    dtype: torch.dtype | None = None
    size: Sizes = ()

    def on_meta(self) -> Tensor:
        """A tensor of this type and size that takes no memory."""
        return torch.empty(self.size, dtype=self.dtype, device="meta")


Index = dict[str, Entry]
"""The values of a folder by their names."""


def parse_index(data: bytes) -> Index:
    """Read an index.

    Args:
        data: the content of its file.

    Raises:
        ValueError: if it is damaged or holds more than data.
    """
    try:
        return dict(_entries(_Unpickler(BytesIO(data)).load().state))
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever a damaged pickle and what it builds may raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"is damaged: {reason:.200}") from None


class _StandIn:
    """An object of a class that is not imported: what it was made with, and its state."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    # Also of the class itself, so that no pickle sets an attribute of it.
    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Tensors(_StandIn):
    pass


class _Place(_StandIn):
    pass


class _Name(_StandIn):
    pass


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_KNOWN: Mapping[tuple[str, str], Any] = {
    (_METADATA_MODULE, "Metadata"): _StandIn,
    (_METADATA_MODULE, "StorageMeta"): _StandIn,
    (_METADATA_MODULE, "BytesStorageMetadata"): _StandIn,
    (_METADATA_MODULE, "TensorStorageMetadata"): _Tensors,
    (_METADATA_MODULE, "TensorProperties"): _StandIn,
    (_METADATA_MODULE, "ChunkStorageMetadata"): _StandIn,
    (_METADATA_MODULE, "MetadataIndex"): _Name,
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"): _StandIn,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Place,
    ("torch.serialization", "_get_layout"): _StandIn,
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    """Makes nothing but stand-ins, tuples and types of numbers."""

    def find_class(self, module: str, name: str) -> Any:
        if (found := _KNOWN.get((module, name))) is not None:
            return found
        if module.partition(".")[0] == "pathlib":
            return _StandIn
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"holds more than data: {module}.{name}")


def _entries(raw: Mapping[str, Any]) -> Iterator[tuple[str, Entry]]:
    """The entries of an unpickled index; any error means that it is damaged."""
    places: dict[tuple[str, Sizes | None], Place] = {}
    for name, place in raw["storage_data"].items():
        if not (isinstance(name, _Name) and isinstance(place, _Place)):
            raise TypeError("places of shards")
        offset = name.state.get("offset")
        places[name.state["fqn"], None if offset is None else _sizes(offset)] = Place(**place.state)
    for name, given in raw["state_dict_metadata"].items():
        path = raw["planner_data"][name]
        if not (
            isinstance(name, str)
            and isinstance(path, tuple)
            and len(path) > 1
            and all(isinstance(key, str | int) for key in path)
            and isinstance(path[0], str)
            and _FOLDERS_OF_DATA.fullmatch(path[0])
        ):
            raise ValueError(f"unknown name {shown(name)}")
        if not isinstance(given, _Tensors):
            yield name, Entry(path, (Shard((), (), places[name, None]),))
            continue
        dtype, size = given.state["properties"].state[0], _sizes(given.state["size"])
        shards = []
        for chunk in given.state["chunks"]:
            offsets, sizes = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
            if math.prod(sizes):  # those of ranks without a part have one place, if any
                shards.append(Shard(offsets, sizes, places[name, offsets]))
        if not _tile(size, shards):
            raise ValueError(f"the shards of {name!r:.200} are not all of it")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"the type of {name!r:.200}")
        yield name, Entry(path, tuple(shards), dtype, size)


def _sizes(given: Any) -> Sizes:
    if not (isinstance(given, tuple) and all(isinstance(n, int) and 0 <= n < _MOST for n in given)):
        raise ValueError(f"sizes {shown(given)}")
    return given


def _tile(size: Sizes, shards: Sequence[Shard]) -> bool:
    """Whether shards are the cells of a grid over a tensor, as those of a `DTensor` are.

    Where they overlapped, as many numbers would be missing, and read from memory that nothing was
    written to.
    """
    if not shards:
        return math.prod(size) == 0
    boxes = {shard.offsets: shard.sizes for shard in shards}
    starts = [sorted({box[axis] for box in boxes}) for axis in range(len(size))]
    lengths = [
        {start: end - start for start, end in pairwise([*axis, n])}
        for axis, n in zip(starts, size, strict=True)
    ]
    cells = math.prod(len(axis) for axis in starts)
    return (
        len(boxes) == len(shards) == cells
        and all(axis[0] == 0 for axis in starts)
        and all(
            sizes == tuple(length[n] for length, n in zip(lengths, box, strict=True))
            for box, sizes in boxes.items()
        )
    )

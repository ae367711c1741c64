"""Folders of sharded checkpoints, as `torch.distributed.checkpoint` writes them, read as data only.

Such a folder has an index, `.metadata`, a file of shards for each process that wrote it, and
`meta.pt` for all else, which Lightning writes last. The index is a pickle that torch reads without
any limit, and so are the shards that are no tensors. Here the index is unpickled into stand-ins
for torch's classes, which do nothing, and its names, sizes and places are checked before any of
them is used. So a folder of a stranger runs no code and takes no more memory than its files.
"""

import math
import pickle
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.serialization.archive import check_archive

META = "meta.pt"
"""What is in a folder beside shards; a folder without it is incomplete."""
_INDEX = ".metadata"
_MAX_INDEX_BYTES = 2**30
_SHARD_NAME = re.compile(r"__\d+_\d+\.distcp")
_FOLDERS_OF_DATA = re.compile(r"state_dict|optimizer_\d+")
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


def is_complete(folder: Path) -> bool:
    """Whether a path is the folder of a sharded checkpoint that was written to its end."""
    return (folder / META).is_file() and (folder / _INDEX).is_file()


def check_replaceable(path: Path) -> None:
    """Raise a FileExistsError if something else than a checkpoint would be replaced by one."""
    if path.is_dir() and not path.is_symlink() and not is_complete(path) and any(path.iterdir()):
        raise FileExistsError(
            f"no checkpoint was written: {path} is a folder with something else than a checkpoint"
        )


def read_folder(folder: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Read a folder as the checkpoint file that one process would have written.

    Args:
        folder: the folder, however many processes wrote it.
        weights_only: refuse what is more than data; off, it can run any code.

    Returns:
        What is in an ordinary checkpoint, on the CPU.

    Raises:
        FileNotFoundError: if the folder is incomplete or not one of a sharded checkpoint.
        ValueError: if a file is damaged, or holds more than data.
        pickle.UnpicklingError: if a shard holds more than data.
    """
    index = read_index(folder)
    checkpoint = read_meta(folder, weights_only=weights_only)
    flat = {
        entry.path: _read_entry(folder, entry, weights_only=weights_only)
        for entry in index.values()
    }
    parts = _nested(flat)
    checkpoint["state_dict"] = parts.pop("state_dict", {})
    if parts:
        numbers = sorted(int(name.removeprefix("optimizer_")) for name in parts)
        states = [parts[f"optimizer_{number}"] for number in numbers]
        checkpoint["optimizer_states"] = [_numbered(state) for state in states]
    return checkpoint


def read_meta(folder: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """What a folder holds beside its shards.

    Raises:
        FileNotFoundError: if the folder is incomplete or not one of a sharded checkpoint.
        ValueError: if it is damaged.
    """
    _check_complete(folder)
    check_archive(folder / META)
    meta = torch.load(folder / META, map_location="cpu", weights_only=weights_only)
    if not isinstance(meta, dict):
        raise ValueError(f"{META} holds no dictionary")
    return meta


def read_index(folder: Path) -> Index:
    """The values of a folder and the places of their shards, which are all there.

    Raises:
        FileNotFoundError: if the folder is incomplete or not one of a sharded checkpoint.
        ValueError: if the index is damaged or holds more than data, or a shard is missing.
    """
    _check_complete(folder)
    path = folder / _INDEX
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise ValueError(f"{_INDEX} is larger than {_MAX_INDEX_BYTES} bytes")
    try:
        raw = _Unpickler(BytesIO(path.read_bytes())).load()
        index = dict(_entries(raw.state))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{_INDEX} {error}") from None
    except Exception as error:  # whatever a damaged pickle and what it builds may raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{_INDEX} is damaged: {reason:.200}") from None
    _check_places(folder, index)
    return index


def read_shard(folder: Path, place: Place) -> BytesIO:
    """The bytes of a shard, which are a whole archive of `torch.save`.

    Raises:
        ValueError: if they are not.
    """
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        data = BytesIO(file.read(place.length))
    check_archive(data)
    return data


def _check_complete(folder: Path) -> None:
    if not is_complete(folder):
        raise FileNotFoundError(
            f"{folder} is not the folder of a sharded checkpoint, or not all of it: it needs "
            f"{META} and {_INDEX}"
        )


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
            isinstance(path, tuple)
            and len(path) > 1
            and all(isinstance(key, str | int) for key in path)
            and isinstance(path[0], str)
            and _FOLDERS_OF_DATA.fullmatch(path[0])
        ):
            raise ValueError(f"unknown name {name!r:.200}")
        if not isinstance(given, _Tensors):
            yield name, Entry(path, (Shard((), (), places[name, None]),))
            continue
        dtype, size = given.state["properties"].state[0], _sizes(given.state["size"])
        shards = []
        for chunk in given.state["chunks"]:
            offsets, sizes = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
            ends = [start + n for start, n in zip(offsets, sizes, strict=True)]
            if any(end > n for end, n in zip(ends, size, strict=True)):
                raise ValueError(f"a shard of {name!r:.200} does not fit into it")
            shards.append(Shard(offsets, sizes, places[name, offsets]))
        if math.prod(size) != sum(math.prod(shard.sizes) for shard in shards):
            raise ValueError(f"the shards of {name!r:.200} are not all of it")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"the type of {name!r:.200}")
        yield name, Entry(path, tuple(shards), dtype, size)


def _sizes(given: Any) -> Sizes:
    if not isinstance(given, tuple) or not all(isinstance(n, int) and n >= 0 for n in given):
        raise ValueError(f"sizes {given!r:.200}")
    return given


def _check_places(folder: Path, index: Index) -> None:
    """Raise a ValueError if shards are not where they should be, or need more memory than bytes."""
    used: dict[str, int] = {}
    for name, entry in index.items():
        for shard in entry.shards:
            file, offset, length, transforms = shard.place
            if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file) or transforms:
                raise ValueError(f"{name!r:.200} is in {file!r:.200}, which is no file of shards")
            path = folder / file
            if not path.is_file() or path.is_symlink():
                raise ValueError(f"{file} is missing, with a part of {name!r:.200}")
            n_bytes = math.prod(shard.sizes) * (0 if entry.dtype is None else entry.dtype.itemsize)
            if not (
                isinstance(offset, int)
                and isinstance(length, int)
                and offset >= 0
                and length >= n_bytes
                and offset + length <= path.stat().st_size
            ):
                raise ValueError(f"{file} does not hold its part of {name!r:.200}")
            used[file] = used.get(file, 0) + length
    for file, n_bytes in used.items():
        if n_bytes > (folder / file).stat().st_size:
            raise ValueError(f"the shards in {file} overlap")


def _read_entry(folder: Path, entry: Entry, *, weights_only: bool) -> Any:
    def read(shard: Shard) -> Any:
        return torch.load(
            read_shard(folder, shard.place), map_location="cpu", weights_only=weights_only
        )

    if entry.dtype is None:
        return read(entry.shards[0])
    whole = torch.empty(entry.size, dtype=entry.dtype)
    for shard in entry.shards:
        part = read(shard)
        if not isinstance(part, Tensor) or (part.dtype, part.shape) != (entry.dtype, shard.sizes):
            raise ValueError(f"a shard in {shard.place.relative_path} is not what the index says")
        box = tuple(
            slice(start, start + n) for start, n in zip(shard.offsets, shard.sizes, strict=True)
        )
        whole[box] = part
    return whole


class _Node(dict[str | int, Any]):
    """A dictionary or a list of the original, not a value of it."""


def _nested(flat: Mapping[tuple[str | int, ...], Any]) -> dict[str, Any]:
    """Dictionaries and lists of values by their paths, in which numbers are places in a list."""
    root = _Node()
    for path, value in flat.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, _Node())
            if not isinstance(node, _Node):
                raise ValueError(f"{path!r:.200} is inside a value")
        node[path[-1]] = value
    found: dict[str, Any] = _plain(root)
    return found


def _plain(value: Any) -> Any:
    if not isinstance(value, _Node):
        return value
    if all(isinstance(key, int) for key in value):
        return [_plain(value[key]) for key in sorted(value)]
    return {key: _plain(each) for key, each in value.items()}


def _numbered(state: Any) -> dict[str, Any]:
    """An optimizer's state with numbers for the names of parameters, as one process saves it."""
    try:
        groups = state["param_groups"]
        names = list(chain.from_iterable(group["params"] for group in groups))
        number = {name: place for place, name in enumerate(names)}
        return {
            "state": {number[name]: each for name, each in state.get("state", {}).items()},
            "param_groups": [
                {**group, "params": [number[name] for name in group["params"]]} for group in groups
            ],
        }
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the optimizer's state is not one: {reason:.200}") from None

"""Folders of sharded checkpoints, as `torch.distributed.checkpoint` writes them, read as data only.

Such a folder has an index, `.metadata`, a file of shards for each process that wrote it, and
`meta.pt` for all else, which Lightning writes last. Names, sizes and places in the index are
compared with the files before any of them is used, and values that are no tensors, which torch
would unpickle, have to be data: a folder of a stranger runs no code, is read nowhere else than in
itself, and makes no tensors that are larger than its files.
"""

import math
import re
from collections.abc import Mapping
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dsmoe.reading import shown
from lightning_dsmoe.serialization.archive import check_archive, load_archive
from lightning_dsmoe.serialization.sharded_index import Entry, Index, Place, Shard, parse_index

META = "meta.pt"
"""What is in a folder beside shards; a folder without it is incomplete."""
_INDEX = ".metadata"
_MAX_INDEX_BYTES = 2**30
_SHARD_NAME = re.compile(r"__\d+_\d+\.distcp")


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
    meta = load_archive(folder / META, weights_only=weights_only)
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
        index = parse_index(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{_INDEX} {error}") from None
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


def _check_places(folder: Path, index: Index) -> None:
    """Raise a ValueError if shards are not where they should be, or need more memory than bytes."""
    used: dict[str, int] = {}
    for name, entry in index.items():
        for shard in entry.shards:
            file, offset, length, transforms = shard.place
            if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file) or transforms:
                raise ValueError(f"{name!r:.200} is in {shown(file)}, which is no file of shards")
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
        return load_archive(read_shard(folder, shard.place), weights_only=weights_only)

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

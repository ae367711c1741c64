"""The index of a sharded checkpoint as data: names, sizes and the shards that make a tensor."""

import pickle
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lightning_dsmoe.serialization.sharded_index import parse_index

NAME = "state_dict.a"
Box = tuple[tuple[int, ...], tuple[int, ...]]


def index(size: Any, boxes: list[Box], name: Any = NAME, path: Any = ("state_dict", "a")) -> bytes:
    """An index of one tensor, whose shards have offsets and sizes."""
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes]
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), size, chunks)
    place = {"relative_path": "__0_0.distcp", "offset": 0, "length": 10}
    info = torch.distributed.checkpoint.filesystem._StorageInfo(**place)  # type: ignore[attr-defined]
    places = {MetadataIndex(NAME, torch.Size(at)): info for at, _ in boxes}
    return pickle.dumps(Metadata({name: tensor}, {name: path}, places))


WHOLE: dict[str, tuple[tuple[int, ...], list[Box]]] = {
    "one": ((2, 3), [((0, 0), (2, 3))]),
    "a number": ((), [((), ())]),
    "nothing": ((0, 3), [((0, 0), (0, 3))]),
    "rows of different numbers": ((5, 2), [((0, 0), (3, 2)), ((3, 0), (2, 2))]),
    "columns": ((2, 4), [((0, 2), (2, 2)), ((0, 0), (2, 2))]),
    "both": ((3, 3), [((r, c), (min(2, 3 - r), min(2, 3 - c))) for r in (0, 2) for c in (0, 2)]),
    "ranks without a part": ((2,), [((0,), (1,)), ((1,), (1,)), ((2,), (0,)), ((2,), (0,))]),
}
NOT_WHOLE: dict[str, tuple[tuple[int, ...], list[Box]]] = {
    "nothing of something": ((2, 3), []),
    "a hole": ((2, 3), [((0, 0), (1, 3))]),
    "twice the same": ((2, 3), [((0, 0), (1, 3)), ((0, 0), (1, 3))]),
    "a part twice": ((4, 1), [((0, 0), (2, 1)), ((1, 0), (2, 1))]),
    "not from the beginning": ((2, 3), [((1, 0), (1, 3))]),
    "beyond the end": ((2, 3), [((0, 0), (3, 2))]),
    "another number of axes": ((6,), [((0, 0), (2, 3))]),
    "a corner twice, and one missing": (
        (2, 2),
        [((0, 0), (1, 2)), ((1, 0), (1, 1)), ((0, 1), (1, 1))],
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_shards_that_make_a_tensor(name: str) -> None:
    size, boxes = WHOLE[name]
    entry = parse_index(index(torch.Size(size), boxes))[NAME]
    assert entry.on_meta().shape == size
    # Of shards without a value there may be many at one place, which then would be read twice.
    assert sorted(shard[:2] for shard in entry.shards) == sorted(b for b in boxes if 0 not in b[1])


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_shards_that_do_not(name: str) -> None:
    size, boxes = NOT_WHOLE[name]
    with pytest.raises(ValueError, match="damaged"):
        parse_index(index(torch.Size(size), boxes))


def nested(depth: int) -> Any:
    """A tuple of a few hundred bytes in a file, which takes 2**depth words to print."""
    value: Any = "x"
    for _ in range(depth):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    ("size", "path"),
    [
        (nested(60), ("state_dict", "a")),
        ((2**63,), ("state_dict", "a")),
        ((-1,), ("state_dict", "a")),
        ((2,), nested(60)),
        ((2,), ("hyper_parameters", "a")),
        ((2,), ("state_dict",)),
    ],
    ids=["nested size", "large", "negative", "nested name", "no weights", "no name"],
)
def test_sizes_and_names_that_are_none(size: Any, path: Any) -> None:
    with pytest.raises(ValueError, match=r"is damaged: ValueError: (sizes|unknown name)"):
        parse_index(index(size, [((0,), (2,))], path=path))

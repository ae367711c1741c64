import json
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_dsmoe.serialization.shards import INDEX, Part, write_shards


def part_of(tensors: dict[str, Tensor]) -> Part:
    empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return Part(empty, partial(list, tensors.values()))


def read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


TENSORS = {
    "a": torch.randn(3, 5).to(torch.bfloat16),
    "b": torch.randn(4, 3).mT,
    "c": torch.randn(7, dtype=torch.float64),
    "d": torch.randn(2, 3, 4).half()[:, 1:],
}


def test_one_file(tmp_path: Path) -> None:
    done: list[int] = []
    parts = [part_of({name: tensor}) for name, tensor in TENSORS.items()]
    write_shards(tmp_path, parts, on_bytes=done.append)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = read(tmp_path / "model.safetensors")
    assert list(found)
    assert all(torch.equal(found[name], each) for name, each in TENSORS.items())
    assert all(found[name].dtype is each.dtype for name, each in TENSORS.items())
    assert sum(done) == sum(tensor.nbytes for tensor in TENSORS.values())


def test_several_files(tmp_path: Path) -> None:
    parts = [part_of({name: tensor}) for name, tensor in TENSORS.items()]
    write_shards(tmp_path, parts, max_bytes=80)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(read(tmp_path / file)[name], TENSORS[name])

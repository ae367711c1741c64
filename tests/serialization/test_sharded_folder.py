"""Folders of shards, honest and not."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.metadata import Metadata

from lightning_dsmoe.serialization.checkpoint import read_checkpoint
from lightning_dsmoe.serialization.sharded_folder import META, is_complete, read_folder, read_index

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
WEIGHT = torch.arange(6.0).reshape(2, 3)
ROW = torch.tensor([1.0, 2.0])
Change = Callable[[Metadata], Any]


class Runs:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights and an optimizer, as Lightning saves them, in the current folder of a test."""
    monkeypatch.chdir(tmp_path)
    group = {"lr": 0.1, "betas": (0.9, 0.99)}
    optimizer = {
        "state": {"b": {"step": torch.tensor(2.0)}, "a.b": {"step": torch.tensor(3.0)}},
        "param_groups": [{**group, "params": ["b"]}, {**group, "params": ["a.b"]}],
    }
    path = tmp_path / "last.ckpt"
    save({"state_dict": {"a.b": WEIGHT, "b": ROW}, "optimizer_0": optimizer}, checkpoint_id=path)
    torch.save({"global_step": 7, "format_version": 1}, path / META)
    return path


def change_index(folder: Path, change: Change) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))


def change_place(metadata: Metadata, name: str, **values: Any) -> None:
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            vars(place).update(values)


def test_it_is_the_file_of_one_process(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint["global_step"] == 7
    assert checkpoint["state_dict"].keys() == {"a.b", "b"}
    assert torch.equal(checkpoint["state_dict"]["a.b"], WEIGHT)
    assert torch.equal(checkpoint["state_dict"]["b"], ROW)
    (state,) = checkpoint["optimizer_states"]
    assert state["state"] == {0: {"step": 2.0}, 1: {"step": 3.0}}
    assert [group["params"] for group in state["param_groups"]] == [[0], [1]]
    assert state["param_groups"][1]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("name", [META, ".metadata"])
def test_a_folder_that_was_not_finished(name: str, folder: Path) -> None:
    assert is_complete(folder)
    (folder / name).unlink()
    assert not is_complete(folder)
    with pytest.raises(FileNotFoundError, match="or not all of it"):
        read_folder(folder)


def bomb(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata["state_dict.b"]
    entry.size = entry.chunks[0].sizes = torch.Size([2**40])


def hole(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata["state_dict.a.b"]
    entry.chunks[0].sizes = torch.Size([1, 3])


def unknown(metadata: Metadata) -> None:
    metadata.planner_data["state_dict.b"] = ("hyper_parameters", "b")


def overlap(metadata: Metadata) -> None:
    for place in metadata.storage_data.values():
        vars(place).update(offset=0, length=4000)


CHANGES: dict[str, tuple[Change, str]] = {
    "code": (lambda m: vars(m).update(version=Runs()), r"holds more than data: posix\.mkdir"),
    "another object": (lambda m: Runs, "holds more than data"),
    "no index": (lambda m: [1], "damaged"),
    "size": (bomb, "does not hold its part"),
    "hole": (hole, "are not all of it"),
    "name": (unknown, "unknown name"),
    "outside": (
        lambda m: change_place(m, "state_dict.b", relative_path="../x"),
        "is no file of shards",
    ),
    "missing": (
        lambda m: change_place(m, "state_dict.b", relative_path="__9_0.distcp"),
        "__9_0.distcp is missing",
    ),
    "offset": (lambda m: change_place(m, "state_dict.b", offset=10**9), "does not hold its part"),
    "length": (lambda m: change_place(m, "state_dict.b", length=1), "does not hold its part"),
    "overlap": (overlap, "overlap"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_that_is_not_honest(name: str, folder: Path) -> None:
    change, message = CHANGES[name]
    change_index(folder, change)
    with pytest.raises(ValueError, match=message):
        read_index(folder)
    with pytest.raises(ValueError, match=str(folder)):
        read_checkpoint(folder)
    assert not Path("ran").exists()


def test_stand_ins_cannot_be_changed_by_a_pickle(folder: Path) -> None:
    """Two states in a tuple set attributes, of a class as well if it is one."""
    path = folder / ".metadata"
    honest = path.read_bytes()
    build = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(NN(S'load'\nI1\ndtb"
    path.write_bytes(b"\x80\x02" + build + b".")
    with pytest.raises(ValueError, match="damaged"):
        read_index(folder)
    path.write_bytes(honest)
    assert read_index(folder)


def test_a_value_that_is_more_than_data(folder: Path) -> None:
    """It takes the place of one of the optimizer's settings, in a file of its own."""
    buffer = io.BytesIO()
    torch.save(Runs(), buffer)
    (folder / "__5_0.distcp").write_bytes(buffer.getvalue())
    where = {"relative_path": "__5_0.distcp", "offset": 0, "length": len(buffer.getvalue())}
    change_index(folder, lambda m: change_place(m, "optimizer_0.param_groups.0.lr", **where))
    with pytest.raises(ValueError, match=r"more than data.*posix\.mkdir"):
        read_checkpoint(folder)
    assert not Path("ran").exists()
    read_checkpoint(folder, weights_only=False)
    assert Path("ran").exists()


def test_damaged_shards_and_rest(folder: Path) -> None:
    (shards,) = folder.glob("*.distcp")
    whole = shards.read_bytes()
    shards.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="does not hold its part"):
        read_checkpoint(folder)
    at = whole.index(ROW.numpy().tobytes())
    shards.write_bytes(whole[: at + 2] + b"\x01" + whole[at + 3 :])
    with pytest.raises(ValueError, match="does not match its checksum"):
        read_checkpoint(folder)
    shards.write_bytes(whole)
    meta = folder / META
    meta.write_bytes(meta.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole archive"):
        read_checkpoint(folder)

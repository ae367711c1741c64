"""Files that are no checkpoint, are damaged, or hold more than data."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.serialization.checkpoint import (
    check_sharing,
    load_decoder,
    read_checkpoint,
)
from lightning_dsmoe.training.language_model import DSMoELanguageModel

from .conftest import Forge, Trained


def test_truncated_files(trained: Trained, tmp_path: Path) -> None:
    whole = trained.path.read_bytes()
    path = tmp_path / "part.ckpt"
    for length in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"part\.ckpt is damaged or not a checkpoint"):
            load_decoder(path)


@pytest.mark.timeout(30)  # a search in torch's own message would take hours
def test_a_name_as_long_as_the_file(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    name = b"c" + b"x" * 2**21 + b"\ny\n"
    with ZipFile(trained.path) as source, ZipFile(path, "w") as target:
        for record in source.infolist():
            content = source.read(record)
            if record.filename.endswith("data.pkl"):
                content = content[:2] + name + content[2:]  # after its protocol
            target.writestr(record.filename, content)
    with pytest.raises(ValueError, match=r"holds more than data, .*: x+$") as error:
        load_decoder(path)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize("garbage", [b"hello", bytes(500), b"PK\3\4" + bytes(200), b"\x80\x02]."])
def test_other_files(garbage: bytes, tmp_path: Path) -> None:
    (tmp_path / "other.ckpt").write_bytes(garbage)
    with pytest.raises(ValueError, match=r"other\.ckpt is damaged or not a checkpoint[^\n]*$"):
        load_decoder(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"not enough memory to read .*model\.ckpt$"),
        (PermissionError(13, "not permitted"), "not permitted$"),
    ],
    ids=["memory", "permission"],
)
def test_what_is_no_fault_of_the_file_is_told_as_it_is(
    error: Exception, message: str, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error), match=message):
        read_checkpoint(trained.path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_decoder(tmp_path / "absent.ckpt")
    with pytest.raises(FileNotFoundError, match="is not the folder of a sharded checkpoint"):
        load_decoder(tmp_path)


class Bomb:
    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.crater),)


@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "extra"])
def test_code_in_a_file_does_not_run(place: str, forge: Forge, tmp_path: Path) -> None:
    crater = tmp_path / "crater"
    path = forge(**{place: {"weight": Bomb(crater)}})
    for load in (load_decoder, DSMoELanguageModel.load_from_checkpoint):
        with pytest.raises(ValueError, match=r"holds more than data, .*: \w+\.mkdir$"):
            load(path)
        assert not crater.exists()
    torch.load(path, weights_only=False)
    assert crater.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format 2, this version reads 1; a newer version of"),
        ({"format_version": 0}, "has format 0, this version reads 1; an older"),
        ({"format_version": ...}, "not a checkpoint of DSMoELanguageModel: no format_version"),
        ({"state_dict": ...}, "is not a checkpoint: it has no state_dict of tensors"),
        ({"state_dict": [1]}, "is not a checkpoint: it has no state_dict of tensors"),
        ({"state_dict": {"weight": 1.0}}, "is not a checkpoint: it has no state_dict of tensors"),
        ({"state_dict": {}}, r"missing embedding\.weight; .*missing head\.weight"),
        ({"architecture": None}, "does not hold its architecture, .*load_from_checkpoint"),
        ({"architecture": ...}, "does not hold its architecture"),
        ({"architecture": {}}, "architecture must have the fields"),
    ],
)
def test_other_checkpoints(changes: dict[str, Any], message: str, forge: Forge) -> None:
    with pytest.raises(ValueError, match=message):
        load_decoder(forge(**changes))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # of torch 2.15
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, 16).expand(2**22, 16),
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(3).to("meta"),
    ],
    ids=["repeated", "sparse", "empty"],
)
def test_tensors_that_are_not_whole(tensor: Tensor, forge: Forge, trained: Trained) -> None:
    state = trained.model.state_dict() | {"decoder.embedding.weight": tensor}
    with pytest.raises(ValueError, match=r"decoder\.embedding\.weight' is not a plain tensor"):
        load_decoder(forge(state_dict=state))
    with pytest.raises(ValueError, match="has no state_dict of tensors"):
        load_decoder(forge(state_dict={0: tensor}))


def repacked(path: Path) -> None:
    with ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    weight = torch.load(path)["state_dict"]["decoder.embedding.weight"]
    content[content.index(weight.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [(repacked, "is compressed"), (flipped, "does not match its checksum")],
)
def test_files_that_were_changed(
    change: Callable[[Path], None], message: str, forge: Forge, trained: Trained
) -> None:
    path = forge()
    change(path)
    message = rf"forged\.ckpt is damaged or not a checkpoint: .*{message}"
    for load in (load_decoder, read_checkpoint, DSMoELanguageModel.load_from_checkpoint):
        with pytest.raises(ValueError, match=message):
            load(path)
    with path.open("rb") as opened, pytest.raises(ValueError, match=message.partition(": ")[2]):
        DSMoELanguageModel.load_from_checkpoint(opened)


def test_optimizer_states_that_are_larger_than_the_file(forge: Forge) -> None:
    repeated = torch.zeros(1).expand(2**40)
    with pytest.raises(ValueError, match="optimizer's state needs plain tensors"):
        read_checkpoint(forge(optimizer_states=[{"state": {0: {"exp_avg": repeated}}}]))


def in_a_circle() -> list[object]:
    circle: list[object] = []
    circle.append(circle)
    return circle


def twice(levels: int) -> object:
    """Containers that each hold the next one twice: hardly any bytes, 2 ** levels values."""
    value: object = 0
    for _ in range(levels):
        part = {"class_path": "lightning_dsmoe.MixtureOfExperts", "init_args": value}
        value = {"feed_forward": part, "attention": part}
    return value


def deep(levels: int) -> object:
    value: object = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [in_a_circle(), twice(30), deep(200), [[0] * 2000] * 2000, {"a": (([1] * 2000,) * 2000,)}],
    ids=["circle", "twice", "deep", "wide", "tuples"],
)
@pytest.mark.parametrize("field", ["architecture", "hyper_parameters", "tokenizer", "callbacks"])
def test_values_without_end_are_refused_at_once(field: str, value: object, forge: Forge) -> None:
    path = forge(**{field: value})
    for load in (load_decoder, DSMoELanguageModel.load_from_checkpoint):
        with pytest.raises(ValueError, match=r"forged\.ckpt nests its values too"):
            load(path)


def test_weights_that_share_their_values() -> None:
    tied, other = torch.zeros(6, 3), torch.zeros(2)
    check_sharing({"embedding": tied, "head": tied, "norm": other})
    with pytest.raises(ValueError, match="the weights share their values"):
        check_sharing({str(layer): tied for layer in range(3)})
    with pytest.raises(ValueError, match="the weights share their values"):
        check_sharing({str(row): tied.flatten()[row:][:9] for row in range(6)})


def test_a_file_of_no_dictionary(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="it has no state_dict of tensors"):
        read_checkpoint(tmp_path / "list.ckpt")

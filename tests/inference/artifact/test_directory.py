"""The directory of a sparse model: whole and unchanged, or refused."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_dsmoe.inference.artifact.directory import read_artifact
from lightning_dsmoe.inference.compilation import compile_sparse
from lightning_dsmoe.routing import SelectionPlan

from ..conftest import CERTIFICATE, DATA, learned_positions_mlp, sign


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_files(artifact: Path) -> None:
    assert sorted(content(artifact)) == sorted(
        ["README.md", "SHA256SUMS", "certificate.json", *DATA]
    )
    certificate = json.loads((artifact / "certificate.json").read_text())
    assert {name: certificate[name] for name in CERTIFICATE} == CERTIFICATE
    config = json.loads((artifact / "config.json").read_text())
    assert config["format_version"] == 2
    sums = (artifact / "SHA256SUMS").read_bytes()
    sign(artifact)
    assert (artifact / "SHA256SUMS").read_bytes() == sums


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_understands_the_sums(artifact: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    checked = subprocess.run(command, cwd=artifact, capture_output=True, text=True)
    assert checked.returncode == 0
    assert checked.stdout.splitlines() == sorted(f"{n}: OK" for n in ("certificate.json", *DATA))


def test_tied_weights_are_kept_once(artifact: Path, tmp_path: Path) -> None:
    names = load_file(artifact / "model.safetensors").keys()
    assert "embedding.weight" in names
    assert "head.weight" not in names
    decoder = read_artifact(artifact).decoder
    assert decoder.head.weight is decoder.embedding.weight
    untied = tmp_path / "untied"
    compile_sparse(learned_positions_mlp(), SelectionPlan()).save(untied)
    assert "head.weight" in load_file(untied / "model.safetensors")
    decoder = read_artifact(untied).decoder
    assert decoder.head.weight is not decoder.embedding.weight


def test_loaded_weights_do_not_hang_on_the_file(artifact: Path, tokens: Tensor) -> None:
    decoder = read_artifact(artifact).decoder
    expected = decoder(tokens).logits
    with (artifact / "model.safetensors").open("r+b") as file:
        file.write(bytes((artifact / "model.safetensors").stat().st_size))
    assert torch.equal(decoder(tokens).logits, expected)


@pytest.mark.parametrize("name", ["certificate.json", *DATA])
def test_a_flipped_bit_anywhere(name: str, artifact: Path) -> None:
    whole = (artifact / name).read_bytes()
    for at in (0, 7, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        (artifact / name).write_bytes(flipped)
        message = f"artifact was changed: SHA256SUMS does not match {name}$"
        if name == "model.safetensors" and at < 8:  # its header is read before it is hashed
            message = f"{name} is not a complete safetensors file"
        with pytest.raises(ValueError, match=message):
            read_artifact(artifact)
    (artifact / name).write_bytes(whole)
    read_artifact(artifact)


def test_flipped_bits_of_the_sums(artifact: Path) -> None:
    whole = (artifact / "SHA256SUMS").read_bytes()
    for changed in (
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 37)),
        b"",
        whole[:-1],
        whole + b"\n",
        whole[::-1],
        b"\xff" * len(whole),
    ):
        (artifact / "SHA256SUMS").write_bytes(changed)
        with pytest.raises(ValueError, match="artifact was changed: SHA256SUMS does not match"):
            read_artifact(artifact)


@pytest.mark.parametrize("name", DATA)
def test_truncated_files(name: str, artifact: Path) -> None:
    whole = (artifact / name).read_bytes()
    for length in (0, 1, 8, len(whole) // 2, len(whole) - 1):
        (artifact / name).write_bytes(whole[:length])
        is_weights = name == "model.safetensors"
        message = f"{name} is not a complete" if is_weights else f"was changed: .* {name}$"
        with pytest.raises(ValueError, match=message):
            read_artifact(artifact)
        if length == len(whole) - 1 and name != "model.safetensors":
            continue  # only the last line end is gone
        sign(artifact)
        with pytest.raises(ValueError, match=f"{name} is not"):
            read_artifact(artifact)
        (artifact / name).write_bytes(whole)
        sign(artifact)


@pytest.mark.parametrize("name", ["SHA256SUMS", *DATA])
def test_missing_files(name: str, artifact: Path) -> None:
    (artifact / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"not a sparse model: {name} is missing"):
        read_artifact(artifact)


def test_other_places(artifact: Path) -> None:
    for path in (artifact / "absent", artifact / "config.json"):
        with pytest.raises(FileNotFoundError, match=r"no sparse model at .*: not a directory"):
            read_artifact(path)


def test_a_certificate_that_is_gone_is_missed_and_a_card_is_not(artifact: Path) -> None:
    (artifact / "README.md").write_text("My own words.")
    read_artifact(artifact)
    (artifact / "README.md").unlink()
    read_artifact(artifact)
    (artifact / "certificate.json").unlink()
    with pytest.raises(ValueError, match="artifact was changed"):
        read_artifact(artifact)

"""Forged weights of an artifact are refused before they take memory."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_dsmoe.inference.artifact import hashes as artifact_hashes
from lightning_dsmoe.inference.artifact.directory import read_artifact

from ..conftest import sign
from .limits import quickly


def safetensors(header: object, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FILES = {
    "no header": b"",
    "header of 200 MB that is not there": struct.pack("<Q", 200_000_000) + b"{}",
    "header without end": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no JSON": safetensors(b"weights"),
    "a list": safetensors([1, 2]),
    "deep": safetensors(b"[" * 100_000),
    "negative offsets": safetensors({"a": entry("F32", [16], [-64, 0])}),
    "backwards": safetensors({"a": entry("F32", [16], [64, 0])}),
    "out of the file": safetensors({"a": entry("F32", [32], [0, 128])}),
    "overlap": safetensors({"a": entry("F32", [16], [0, 64]), "b": entry("F32", [8], [32, 64])}),
    "gap": safetensors({"a": entry("F32", [8], [0, 32]), "b": entry("F32", [4], [48, 64])}),
    "shape of another size": safetensors({"a": entry("F32", [17], [0, 64])}),
    "negative shape": safetensors({"a": entry("F32", [-16], [0, 64])}),
    "shape without end": safetensors({"a": entry("F32", [2**40, 2**40], [0, 64])}),
    "type of another size": safetensors({"a": entry("F64", [16], [0, 64])}),
    "unknown type": safetensors({"a": entry("F31", [16], [0, 64])}),
    "bytes left": safetensors({"a": entry("F32", [8], [0, 32])}),
}


@pytest.mark.parametrize("name", FILES)
def test_forged_weights_are_refused_quickly(name: str, float_artifact: Path) -> None:
    (float_artifact / "model.safetensors").write_bytes(FILES[name])
    sign(float_artifact)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        quickly(lambda: read_artifact(float_artifact))


def test_a_header_of_90_mb_that_is_not_there_is_refused_quickly(float_artifact: Path) -> None:
    with (float_artifact / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(90_000_008)
    sign(float_artifact)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        quickly(lambda: read_artifact(float_artifact))


def test_weights_of_another_model_are_refused_with_one_list(artifact: Path) -> None:
    def forge(**changes: Tensor | None) -> None:
        tensors = {n: t for n, t in {**weights, **changes}.items() if t is not None}
        save_file(tensors, artifact / "model.safetensors")
        (artifact / "certificate.json").unlink(missing_ok=True)
        sign(artifact)

    weights = load_file(artifact / "model.safetensors")
    norm, router = "blocks.1.attention_norm.weight", "blocks.0.feed_forward.router.weight"
    forge(**{norm: None, "extra": torch.zeros(1), router: torch.zeros(5, 16)})
    message = rf"missing {norm}; unknown extra; {router} is \(5, 16\), not \(4, 16\)$"
    with pytest.raises(ValueError, match=message):
        read_artifact(artifact)
    forge(**{norm: weights[norm].to(torch.int32)})
    with pytest.raises(ValueError, match=rf"{norm} is torch\.int32, not torch\.float32$"):
        read_artifact(artifact)
    forge(**{norm: weights[norm].to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=rf"{norm}' is 'F8_E4M3', allowed are F64, F32, "):
        read_artifact(artifact)
    codes = "blocks.0.feed_forward.experts.w_in.weight"
    if weights[codes].dtype == torch.int8:
        for dtype in (torch.float32, torch.uint8):
            forge(**{codes: weights[codes].to(dtype)})
            with pytest.raises(ValueError, match=rf"{codes} is {dtype}, not torch\.int8$"):
                read_artifact(artifact)
    forge(**{norm: weights[norm].bfloat16()})
    assert read_artifact(artifact).decoder.get_parameter(norm).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, artifact: Path) -> None:
    weights = load_file(artifact / "model.safetensors")
    names = ["embedding.weight", "blocks.1.feed_forward.experts.w_in.weight"]
    if weights[names[1]].dtype == torch.int8:
        names[1] = "blocks.1.feed_forward.experts.w_in.scales"
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            damaged = weights[name].clone()
            damaged.view(-1)[-1] = value
            save_file({**weights, name: damaged.to(dtype)}, artifact / "model.safetensors")
            (artifact / "certificate.json").unlink(missing_ok=True)
            sign(artifact)
            with pytest.raises(ValueError, match=rf"not finite: {name} holds NaN or infinity$"):
                read_artifact(artifact)
            if "scales" in name:
                break  # which are float32 whatever the model


def test_a_file_of_50_gb_is_refused_before_it_is_hashed(
    float_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def sha256(path: Path) -> str:
        hashed.append(path.name)
        return digest(path)

    digest = artifact_hashes.sha256
    monkeypatch.setattr(artifact_hashes, "sha256", sha256)
    path = float_artifact / "model.safetensors"
    whole = path.read_bytes()
    size = 50 * 2**30
    for start in (whole, safetensors({"a": entry("F32", [size // 4], [0, size])}, b"")):
        path.write_bytes(start)
        os.truncate(path, size)
        with pytest.raises(ValueError, match=rf"has {size} bytes, which is too much for \d+ weig"):
            quickly(lambda: read_artifact(float_artifact))
    assert path.name not in hashed
    path.write_bytes(whole)
    for name in ("config.json", "plan.json", "certificate.json"):
        small = (float_artifact / name).read_bytes()
        os.truncate(float_artifact / name, size)
        hashed.clear()
        with pytest.raises(ValueError, match=f"{name} is larger than 67108864 bytes"):
            quickly(lambda: read_artifact(float_artifact))
        assert not hashed
        (float_artifact / name).write_bytes(small)
    read_artifact(float_artifact)

"""The directory of a sparse model: plain data and weights, checked before anything is loaded.

`config.json` (architecture, format version, tokenizer), `plan.json`, `model.safetensors`,
`README.md` (for people), `certificate.json` if something was measured, and `SHA256SUMS`, which
`sha256sum -c` understands.
"""

import json
import os
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.files import check_json_size, hidden_beside, read_json
from lightning_dsmoe.finite import check_finite
from lightning_dsmoe.inference.artifact.config import FORMAT_VERSION, check_config
from lightning_dsmoe.inference.artifact.hashes import (
    CARD,
    CERTIFICATE,
    CONFIG,
    PLAN,
    SUMS,
    WEIGHTS,
    certified_hashes,
    check_certificate,
    check_sums,
    summed,
    sums,
)
from lightning_dsmoe.inference.engine.weights.packing import pack_empty
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.architecture import build_decoder
from lightning_dsmoe.serialization.checkpoint import check_state, fill

_NEEDED = (SUMS, CONFIG, PLAN, WEIGHTS)
_TIED_HEAD = "head.weight"
_MAX_HEADER_BYTES = 100_000_000 + 8  # of safetensors
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Artifact(NamedTuple):
    """What an artifact directory holds, loaded."""

    decoder: Decoder
    plan: SelectionPlan
    config: dict[str, Any]


def write_artifact(
    path: Path,
    decoder: Decoder,
    plan: SelectionPlan,
    config: dict[str, Any],
    *,
    card: str,
    certificate: dict[str, Any] | None = None,
) -> None:
    """Write an artifact directory, whole or not at all; an earlier artifact there is replaced.

    Other files in the directory of the earlier artifact stay.

    A certificate is written with `sha256`, the hashes of what it is of.

    Raises:
        FileExistsError: if something else than an artifact is in the way.
        ValueError: if the certificate has other hashes, or the artifact could not be read again.
    """
    check_free(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = hidden_beside(path)
    try:
        _keep_others(path, folder)
        state = {
            name: tensor.detach().contiguous().cpu()
            for name, tensor in decoder.state_dict().items()
            if not (decoder.tie_embeddings and name == _TIED_HEAD)
        }
        _write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, **config})
        _write_json(folder / PLAN, plan.to_dict())
        described = _described(folder)
        check_finite(state)
        save_file(state, folder / WEIGHTS)
        _check_header(described, folder / WEIGHTS)
        finish(folder, path, card=card, certificate=certificate)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(path: Path) -> None:
    """Raise a FileExistsError if something else than an artifact is at `path`."""
    if path.exists() and not all((path / name).is_file() for name in _NEEDED):
        raise FileExistsError(f"{path} exists and is not a sparse model; choose another place")


def read_artifact(path: Path, *, certified: bool = True) -> Artifact:
    """Load an artifact directory after checking all of it, what is cheap to check first.

    Args:
        path: the directory.
        certified: refuse a certificate of other files; off, it is left aside.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file was changed or is not what it should be.
    """
    check_files(path)
    small = [name for name in summed(path) if name != WEIGHTS]
    for name in small:
        check_json_size(path / name)
    check_sums(path, small)
    artifact = _described(path)
    _check_header(artifact, path / WEIGHTS)
    weights = check_sums(path, [WEIGHTS])
    if certified and CERTIFICATE in small:
        check_certificate(path, weights[WEIGHTS])
    _load_weights(artifact.decoder, path / WEIGHTS)
    return artifact


def check_files(path: Path) -> None:
    """Raise a FileNotFoundError if `path` is not an artifact or one of its files is missing."""
    if not path.is_dir():
        raise FileNotFoundError(f"no sparse model at {path}: not a directory")
    for name in _NEEDED:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a sparse model: {name} is missing")


def copy_linked(path: Path, folder: Path, *, without: Container[str] = ()) -> None:
    """Copy what a directory holds, without the content of files where the file system can."""

    def left_out(where: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(where) == path and name in without]

    shutil.copytree(path, folder, symlinks=True, ignore=left_out, copy_function=_link)


def finish(folder: Path, path: Path, *, card: str, certificate: dict[str, Any] | None) -> None:
    """Write what tells of an artifact's other files, and put the folder in its place.

    Raises:
        ValueError: if the certificate says that it is of other files.
    """
    if certificate is not None:
        hashes = certified_hashes(folder)
        if certificate.get("sha256", hashes) != hashes:
            raise ValueError("this certificate is of another model: its SHA-256 are others")
        _write_json(folder / CERTIFICATE, {**certificate, "sha256": hashes})
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / SUMS).write_text("".join(sums(folder)), encoding="utf-8")
    _move(folder, path)


def _keep_others(path: Path, folder: Path) -> None:
    """Make the folder of a new artifact, with what else is in the directory of an earlier one."""
    if path.exists():
        copy_linked(path, folder, without={*_NEEDED, CERTIFICATE, CARD})
    else:
        folder.mkdir()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _move(folder: Path, path: Path) -> None:
    """Put a finished folder in its place; what was there goes only when that has worked."""
    if not path.exists():
        folder.rename(path)
        return
    retired = folder.with_name(f"{folder.name}.old")
    try:
        path.rename(retired)
        folder.rename(path)
    except BaseException:
        if retired.exists() and not path.exists():
            retired.rename(path)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _described(path: Path) -> Artifact:
    """Plan and configuration of an artifact, and the decoder that they tell of, without weights."""
    config = read_json(path / CONFIG)
    check_config(path / CONFIG, config)
    decoder = build_decoder(config["architecture"])
    plan = SelectionPlan.from_dict(read_json(path / PLAN))
    plan.check(*decoder.plan_sizes)
    return Artifact(decoder, plan, config)


def _check_header(artifact: Artifact, path: Path) -> None:
    """Pack a decoder on the meta device, and compare that with what a file says that it holds."""
    decoder, _, config = artifact
    n_weights = sum(tensor.numel() for tensor in decoder.state_dict().values())
    if path.stat().st_size > _MAX_HEADER_BYTES + 8 * n_weights:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, which is too much for {n_weights} weights"
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            headers = {name: _empty(name, file.get_slice(name)) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    embedding = headers.get("embedding.weight")
    pack_empty(
        decoder,
        dtype=torch.float32 if embedding is None else embedding.dtype,
        quantization=config["quantization"],
        quantize_head=config["quantize_head"],
    )
    expected = {
        name: tensor
        for name, tensor in decoder.state_dict().items()
        if not (decoder.tie_embeddings and name == _TIED_HEAD)
    }
    check_state(expected, headers)


def _load_weights(decoder: Decoder, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_finite(state)
        fill(decoder, state)
    decoder.requires_grad_(False)


def _empty(name: str, header: Any) -> Tensor:
    """A tensor without memory, of the shape and type that a safetensors header tells."""
    dtype = header.get_dtype()
    if dtype not in _DTYPES:
        raise ValueError(f"{name} is {dtype}, allowed are {', '.join(_DTYPES)}")
    return torch.empty(header.get_shape(), dtype=_DTYPES[dtype], device="meta")


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    check_json_size(path)

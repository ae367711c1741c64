"""The directory of a sparse model: plain data and weights, checked before anything is loaded.

`config.json` (architecture, format version, tokenizer), `plan.json`, `model.safetensors`,
`README.md` (for people), `certificate.json` if something was measured, and `SHA256SUMS`, which
`sha256sum -c` understands.
"""

import hashlib
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
from lightning_dsmoe.files import hidden_beside, read_json, sha256
from lightning_dsmoe.inference.architecture import build_decoder
from lightning_dsmoe.inference.artifact_config import FORMAT_VERSION, check_config
from lightning_dsmoe.inference.checkpoint import check_state, fill
from lightning_dsmoe.inference.engine.packing import expect_packed
from lightning_dsmoe.routing import SelectionPlan

CONFIG, PLAN, WEIGHTS, SUMS = "config.json", "plan.json", "model.safetensors", "SHA256SUMS"
CERTIFICATE, CARD = "certificate.json", "README.md"
_NEEDED = (SUMS, CONFIG, PLAN, WEIGHTS)
_TIED_HEAD = "head.weight"
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
        ValueError: if the certificate has other hashes.
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
        save_file(state, folder / WEIGHTS)
        _write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, **config})
        _write_json(folder / PLAN, plan.to_dict())
        finish(folder, path, card=card, certificate=certificate)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(path: Path) -> None:
    """Raise a FileExistsError if something else than an artifact is at `path`."""
    if path.exists() and not all((path / name).is_file() for name in _NEEDED):
        raise FileExistsError(f"{path} exists and is not a sparse model; choose another place")


def read_artifact(path: Path) -> Artifact:
    """Load an artifact directory after checking all of it.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file was changed or is not what it should be.
    """
    check_files(path)
    _check_sums(path)
    config = read_json(path / CONFIG)
    check_config(path / CONFIG, config)
    decoder = build_decoder(config["architecture"])
    plan = SelectionPlan.from_dict(read_json(path / PLAN))
    plan.check(*decoder.plan_sizes)
    try:
        _load_weights(decoder, path / WEIGHTS, config)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is not a complete safetensors file: {error}") from None
    return Artifact(decoder, plan, config)


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
    (folder / SUMS).write_text("".join(_sums(folder)), encoding="utf-8")
    _move(folder, path)


def certified_hashes(path: Path) -> dict[str, str]:
    """What ties a certificate to its model: the SHA-256 of the plan, the weights and the rest.

    The configuration counts without the switch points, which are those of a machine.
    """
    config = read_json(path / CONFIG)
    del config["switch_points"]
    rest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return {CONFIG: rest, **{name: sha256(path / name) for name in (PLAN, WEIGHTS)}}


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


def _load_weights(decoder: Decoder, path: Path, config: dict[str, Any]) -> None:
    with safe_open(path, framework="pt") as file:
        headers = {name: _empty(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        embedding = headers.get("embedding.weight")
        expect_packed(
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
        fill(decoder, {name: file.get_tensor(name) for name in headers})
    decoder.requires_grad_(False)


def _empty(name: str, header: Any) -> Tensor:
    """A tensor without memory, of the shape and type that a safetensors header tells."""
    dtype = header.get_dtype()
    if dtype not in _DTYPES:
        raise ValueError(f"{name} is {dtype}, allowed are {', '.join(_DTYPES)}")
    return torch.empty(header.get_shape(), dtype=_DTYPES[dtype], device="meta")


def _check_sums(path: Path) -> None:
    sums = _sums(path)
    found = b""
    if (path / SUMS).stat().st_size == len("".join(sums)):
        found = (path / SUMS).read_bytes()
    if found == "".join(sums).encode():
        return
    lines = found.decode("ascii", "replace").splitlines(keepends=True)
    changed = [line.split()[1] for line in sums if line not in lines]
    raise ValueError(
        f"{path} was changed: {SUMS} does not tell the SHA-256 of {', '.join(changed) or 'it'}"
    )


def _sums(path: Path) -> list[str]:
    """The lines of SHA256SUMS: every file but the model card, which people may edit."""
    names = sorted(name for name in (CERTIFICATE, CONFIG, PLAN, WEIGHTS) if (path / name).is_file())
    return [f"{sha256(path / name)}  {name}\n" for name in names]


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")

"""The directory of a sparse model: plain data and weights, checked before anything is loaded.

`config.json` (architecture, format version, tokenizer), `plan.json`, `model.safetensors`,
`README.md` (for people), `certificate.json` if something was measured, and `SHA256SUMS`, which
`sha256sum -c` understands.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.architecture import build_decoder
from lightning_dsmoe.inference.checkpoint import check_state
from lightning_dsmoe.inference.quantization import expect_int8
from lightning_dsmoe.routing import SelectionPlan

FORMAT_VERSION = 1
CONFIG, PLAN, WEIGHTS, SUMS = "config.json", "plan.json", "model.safetensors", "SHA256SUMS"
CERTIFICATE, CARD = "certificate.json", "README.md"
_CONFIG_FIELDS = {"format_version", "architecture", "quantization", "context", "tokenizer"}
_MAX_JSON_BYTES = 64 * 2**20
_TIED_HEAD = "head.weight"


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

    Raises:
        FileExistsError: if something else than an artifact is in the way.
    """
    if path.exists() and not (path.is_dir() and (path / SUMS).is_file()):
        raise FileExistsError(f"{path} exists and is not a sparse model; choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        state = {
            name: tensor.detach().contiguous().cpu()
            for name, tensor in decoder.state_dict().items()
            if not (decoder.tie_embeddings and name == _TIED_HEAD)
        }
        save_file(state, folder / WEIGHTS)
        _write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, **config})
        _write_json(folder / PLAN, plan.to_dict())
        if certificate is not None:
            _write_json(folder / CERTIFICATE, certificate)
        sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
        (folder / CARD).write_text(card, encoding="utf-8")
        (folder / SUMS).write_text("".join(sums), encoding="utf-8")
        folder.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_artifact(path: Path) -> Artifact:
    """Load an artifact directory after checking all of it.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file was changed or is not what it should be.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no sparse model at {path}: not a directory")
    for name in (SUMS, CONFIG, PLAN, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a sparse model: {name} is missing")
    _check_sums(path)
    config = _read_json(path / CONFIG)
    if not isinstance(config, dict) or set(config) != _CONFIG_FIELDS:
        raise ValueError(f"{path / CONFIG} must have the fields {sorted(_CONFIG_FIELDS)}")
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {config['format_version']!r}, this version reads {FORMAT_VERSION}"
        )
    if config["quantization"] not in (None, "int8"):
        raise ValueError(f"{path}: quantization {config['quantization']!r} is not null or int8")
    decoder = build_decoder(config["architecture"])
    if config["quantization"] == "int8":
        expect_int8(decoder)
    plan = SelectionPlan.from_dict(_read_json(path / PLAN))
    plan.check(*decoder.plan_sizes)
    _load_weights(decoder, path / WEIGHTS)
    return Artifact(decoder, plan, config)


def _load_weights(decoder: Decoder, path: Path) -> None:
    expected = {
        name: tensor
        for name, tensor in decoder.state_dict().items()
        if not (decoder.tie_embeddings and name == _TIED_HEAD)
    }
    try:
        with safe_open(path, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            check_state(expected, {name: _shape_of(header) for name, header in headers.items()})
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in headers}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None
    decoder.load_state_dict(state, strict=False, assign=True)
    if decoder.tie_embeddings:
        decoder.head.weight = decoder.embedding.weight
    decoder.requires_grad_(False)


def _shape_of(header: Any) -> Tensor:  # noqa: ANN401 - safetensors has no types
    return torch.empty(header.get_shape(), device="meta")


def _check_sums(path: Path) -> None:
    lines = (path / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in (CONFIG, PLAN, WEIGHTS):
        if name not in sums:
            raise ValueError(f"{path / SUMS} does not list {name}")
    for name, digest in sums.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"{path / SUMS} lists {name!r}, which is not a file beside it")
        if _sha256(file) != digest:
            raise ValueError(f"{file} was changed: its SHA-256 is not the one in {SUMS}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:  # noqa: ANN401 - checked by the caller
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_JSON_BYTES} bytes")
    return json.loads(path.read_text(encoding="utf-8"))

"""The directory of a sparse model: plain data and weights, verified before anything is loaded.

`config.json` (architecture, format version, tokenizer), `plan.json`, `model.safetensors`,
`README.md` (the model card), `certificate.json` if something was measured, and `SHA256SUMS`, which
`sha256sum -c` reads. It may come from a stranger, so nothing in it is code, and nothing takes
memory before its size is known to be that of the described model.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_type_hints

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.files import check_json_size, check_place, read_json
from lightning_dsmoe.finite import check_finite
from lightning_dsmoe.folders import replaced_folder
from lightning_dsmoe.inference.artifact import hashes
from lightning_dsmoe.inference.artifact.hashes import CARD, CERTIFICATE, CONFIG, PLAN, SUMS, WEIGHTS
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.weights.packing import pack_empty
from lightning_dsmoe.reading import Count, check_json, check_version
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.architecture import build_decoder
from lightning_dsmoe.serialization.checkpoint import TEXT_FIELDS, check_state, fill
from lightning_dsmoe.serialization.tensor_files import MAX_HEADER_BYTES, read_header

FORMAT_VERSION = 2
COMMON_FIELDS = {
    "format_version": int,
    "quantization": Literal["int8"] | None,
    "switch_points": {**get_type_hints(SwitchPoints), "gather_up_to": Count, "grouped_from": Count},
}
_FIELDS = {
    **COMMON_FIELDS,
    "architecture": dict,  # which `build_decoder` checks
    "quantize_head": bool,
    **TEXT_FIELDS,
}
_REQUIRED = (SUMS, CONFIG, PLAN, WEIGHTS)
_FILES = frozenset({*_REQUIRED, CERTIFICATE, CARD, hashes.FRONTIER})

Described = TypeVar("Described")


class Artifact(NamedTuple):
    """The content of the artifact directory of a decoder."""

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
    frontier: Path | None = None,
) -> None:
    """Write the artifact of a decoder atomically; see `write_files`.

    Args:
        path: the directory.
        decoder: the packed decoder.
        plan: the experts that run.
        config: the fields of `config.json` but for its version.
        card: the model card.
        certificate: measurements; written with `sha256`, the hashes of the files they belong to.
        frontier: a picture of loss against active share to copy.

    Raises:
        FileExistsError: if something else than an artifact is at the path.
        ValueError: if the certificate has other hashes, or the artifact could not be read again.
    """
    state = _stored_state(decoder)

    def verify(folder: Path) -> None:
        _check_header(_described(folder), folder / WEIGHTS)
        check_finite(state)

    write_files(
        path,
        state,
        plan,
        config,
        verify=verify,
        card=card,
        certificate=certificate,
        frontier=frontier,
    )


def write_files(
    path: Path,
    state: Mapping[str, Tensor],
    plan: SelectionPlan,
    config: dict[str, Any],
    *,
    verify: Callable[[Path], None],
    card: str,
    certificate: dict[str, Any] | None = None,
    frontier: Path | None = None,
) -> None:
    """Write an artifact directory atomically; an earlier artifact there is replaced.

    Everything is written to a hidden directory beside it, which is then renamed: a full disk or a
    killed process leaves the earlier artifact as it was, and at worst the hidden directory. Other
    files in the directory of the earlier artifact stay.

    Args:
        path: the directory.
        state: the tensors by their names.
        plan: the experts that run.
        config: the fields of `config.json` but for its version.
        verify: raises if what is in a directory cannot be read again.
        card: the model card.
        certificate: measurements; written with `sha256`, the hashes of the files they belong to.
        frontier: a picture of loss against active share to copy.

    Raises:
        FileExistsError: if something else than an artifact is at the path.
        ValueError: if the certificate has other hashes, or the artifact could not be read again.
    """
    check_free(path)
    with replaced_folder(path, is_ours=_FILES.__contains__) as folder:
        if frontier is not None:
            shutil.copyfile(frontier, folder / hashes.FRONTIER)
        _write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, **config})
        _write_json(folder / PLAN, plan.to_dict())
        save_file(_in_memory_of_their_own(state), folder / WEIGHTS)
        verify(folder)  # the checks of loading, so that nothing is written that nobody can read
        finish(folder, card=card, certificate=certificate)


def check_free(path: Path) -> None:
    """Raise an error if something else than an artifact is at `path`, or none can be written."""
    if path.exists() and not all((path / name).is_file() for name in _REQUIRED):
        raise FileExistsError(f"{path} exists and is not a sparse model; choose another path")
    check_place(path)


def read_artifact(path: Path, *, certified: bool = True) -> Artifact:
    """Load the artifact of a decoder after verifying all of it.

    Args:
        path: the directory.
        certified: refuse a certificate that belongs to other files; false ignores it.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file was changed or is invalid.
    """
    artifact = verified_files(path, _described, _check_header, certified=certified)
    _load_weights(artifact.decoder, path / WEIGHTS)
    return artifact


def verified_files(
    path: Path,
    describe: Callable[[Path], Described],
    check_header: Callable[[Described, Path], None],
    *,
    certified: bool,
) -> Described:
    """Verify all files of an artifact before its weights are loaded.

    Args:
        path: the directory.
        describe: reads the small files of the directory.
        check_header: compares the header of the weights with what that gave.
        certified: refuse a certificate that belongs to other files; false ignores it.

    Returns:
        What `describe` gave.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file was changed or is invalid.
    """
    check_files(path)
    # From cheap to dear: sizes, hashes of the small files, the header of the weights, and only then
    # the hash of the weights. A forged file of 50 GB is refused by its size, not after a minute.
    small = [name for name in hashes.hashed_files(path) if name != WEIGHTS]
    for name in small:
        check_json_size(path / name)
    hashes.check_sums(path, small)
    described = describe(path)
    check_header(described, path / WEIGHTS)
    weights = hashes.check_sums(path, [WEIGHTS])
    if certified and CERTIFICATE in small:
        hashes.check_certificate(path, weights[WEIGHTS])
    return described


def check_files(path: Path) -> None:
    """Raise a FileNotFoundError if `path` is not an artifact or one of its files is missing."""
    if not path.is_dir():
        raise FileNotFoundError(f"no sparse model at {path}: not a directory")
    for name in _REQUIRED:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a sparse model: {name} is missing")


def finish(folder: Path, *, card: str, certificate: dict[str, Any] | None) -> None:
    """Write certificate, card and SHA256SUMS of an artifact's files.

    Args:
        folder: the hidden directory with all other files.
        card: the model card.
        certificate: measurements, with or without the hashes of the files they belong to.

    Raises:
        ValueError: if the certificate belongs to other files.
    """
    if certificate is not None:
        certified = hashes.certified_hashes(folder)
        if certificate.get("sha256", certified) != certified:
            raise ValueError("hash mismatch: this certificate belongs to another model")
        _write_json(folder / CERTIFICATE, {**certificate, "sha256": certified})
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / SUMS).write_text("".join(hashes.sum_lines(folder)), encoding="utf-8")


def read_config(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an artifact, with the fields that are given.

    Raises:
        ValueError: if it is in another format or has other fields.
    """
    config = read_json(path / CONFIG)
    check_version(str(path / CONFIG), config, FORMAT_VERSION)
    checked: dict[str, Any] = check_json(str(path / CONFIG), config, fields)
    return checked


def _described(path: Path) -> Artifact:
    """Plan and configuration of an artifact, and the decoder on the meta device."""
    config = read_config(path, _FIELDS)
    decoder = build_decoder(config["architecture"])
    plan = SelectionPlan.from_dict(read_json(path / PLAN))
    decoder.selections(plan)  # raises if it does not fit
    return Artifact(decoder, plan, config)


def _check_header(artifact: Artifact, path: Path) -> None:
    """Compare the header of a file with the decoder, which is packed on the meta device for it."""
    decoder, _, config = artifact
    headers = read_headers(path, sum(tensor.numel() for tensor in decoder.state_dict().values()))
    embedding = headers.get("embedding.weight")
    pack_empty(
        decoder,
        dtype=torch.float32 if embedding is None else embedding.dtype,
        quantization=config["quantization"],
        quantize_head=config["quantize_head"],
    )
    check_state(_stored_state(decoder), headers)


def read_headers(path: Path, n_weights: int) -> dict[str, Tensor]:
    """The tensors of a file of weights on the meta device.

    Args:
        path: the file.
        n_weights: numbers that the model has.

    Raises:
        ValueError: if the file is too large for the model or no whole safetensors file.
    """
    if path.stat().st_size > MAX_HEADER_BYTES + 8 * (1 + n_weights):
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, which is too much for {n_weights} weights"
        )
    try:
        found = read_header(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file of known types: {error}"
        ) from None
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in found.items()}


def _stored_state(decoder: Decoder) -> dict[str, Tensor]:
    """The tensors in the file of weights, which has tied embeddings once."""
    state = decoder.state_dict()
    if decoder.tie_embeddings:
        del state["head.weight"]
    return state


def _load_weights(decoder: Decoder, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_finite(state)
        fill(decoder, state)
    decoder.requires_grad_(False)


def _in_memory_of_their_own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU of what lies elsewhere or shares memory, which no file can hold."""
    found, storages = {}, set()
    for name, tensor in state.items():
        plain = tensor.detach().contiguous().cpu()
        storage = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return found


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    check_json_size(path)

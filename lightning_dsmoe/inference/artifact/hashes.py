"""Hashes of an artifact's files: SHA256SUMS, and the model that a certificate belongs to."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lightning_dsmoe.files import read_json, sha256

CONFIG, PLAN, WEIGHTS, SUMS = "config.json", "plan.json", "model.safetensors", "SHA256SUMS"
CERTIFICATE, CARD, FRONTIER = "certificate.json", "README.md", "frontier.png"
_KINDS = {CONFIG: "another configuration", PLAN: "another plan", WEIGHTS: "other weights"}


def certified_hashes(path: Path, weights: str | None = None) -> dict[str, str]:
    """SHA-256 of the files that tie a certificate to its model, by their names.

    Args:
        path: the artifact.
        weights: SHA-256 of the weights, if that is known.
    """
    config = read_json(path / CONFIG)
    # Switch points belong to a machine: tuning a model elsewhere must not void its certificate.
    del config["switch_points"]
    return {
        CONFIG: hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        PLAN: sha256(path / PLAN),
        WEIGHTS: weights or sha256(path / WEIGHTS),
    }


def check_certificate(path: Path, weights: str) -> None:
    """Raise a ValueError if the certificate belongs to other files; one without hashes passes."""
    certificate = read_json(path / CERTIFICATE)
    if not isinstance(certificate, dict) or "sha256" not in certificate:
        return
    for name, found in certified_hashes(path, weights).items():
        certified = certificate["sha256"]
        expected = certified.get(name) if isinstance(certified, dict) else certified
        if expected != found:
            raise ValueError(
                f"{path} is certified for {_KINDS[name]}: the SHA-256 of {name} is {found}, "
                f"{CERTIFICATE} has {expected!r:.70}"
            )


def check_sums(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Verify SHA256SUMS for some of an artifact's files.

    Args:
        path: the artifact.
        names: the files to hash; that the sums list all other files is verified too.

    Returns:
        SHA-256 of those files.

    Raises:
        ValueError: if they were changed, or SHA256SUMS lists other files.
    """
    listed = hashed_files(path)
    content = b""
    # A file of another size is not read, whatever it is.
    if (path / SUMS).stat().st_size == sum(len(_line(name, "0" * 64)) for name in listed):
        content = (path / SUMS).read_bytes()
    lines = content.decode("ascii", "replace").splitlines(keepends=True)
    digests = {name: sha256(path / name) for name in names}
    changed = [name for name, digest in digests.items() if _line(name, digest) not in lines]
    if changed or [line[64:] for line in lines] != [_line(name, "") for name in listed]:
        raise ValueError(
            f"{path} was changed: {SUMS} does not match {', '.join(changed) or 'its files'}"
        )
    return digests


def sum_lines(path: Path) -> list[str]:
    """The lines of SHA256SUMS."""
    return [_line(name, sha256(path / name)) for name in hashed_files(path)]


def hashed_files(path: Path) -> list[str]:
    """The files in SHA256SUMS: all but the model card, which people may edit, and its picture."""
    return sorted(n for n in (CERTIFICATE, CONFIG, PLAN, WEIGHTS) if (path / n).is_file())


def _line(name: str, digest: str) -> str:
    return f"{digest}  {name}\n"

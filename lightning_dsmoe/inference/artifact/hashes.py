"""Hashes of an artifact's files: what SHA256SUMS tells, and which model a certificate is of."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lightning_dsmoe.files import read_json, sha256

CONFIG, PLAN, WEIGHTS, SUMS = "config.json", "plan.json", "model.safetensors", "SHA256SUMS"
CERTIFICATE, CARD, FRONTIER = "certificate.json", "README.md", "frontier.png"
_KINDS = {CONFIG: "another configuration", PLAN: "another plan", WEIGHTS: "other weights"}


def certified_hashes(path: Path, weights: str | None = None) -> dict[str, str]:
    """What ties a certificate to its model: the SHA-256 of the plan, the weights and the rest.

    The configuration counts without the switch points, which are those of a machine.

    Args:
        path: the artifact.
        weights: SHA-256 of the weights, if that is known.
    """
    config = read_json(path / CONFIG)
    del config["switch_points"]
    return {
        CONFIG: hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        PLAN: sha256(path / PLAN),
        WEIGHTS: weights or sha256(path / WEIGHTS),
    }


def check_certificate(path: Path, weights: str) -> None:
    """Raise a ValueError if the certificate is of other files; formats of old do not say."""
    certificate = read_json(path / CERTIFICATE)
    if not isinstance(certificate, dict) or "sha256" not in certificate:
        return
    for name, found in certified_hashes(path, weights).items():
        certified = certificate["sha256"]
        expected = certified.get(name) if isinstance(certified, dict) else certified
        if expected != found:
            raise ValueError(
                f"{path} is certified for {_KINDS[name]}: the SHA-256 of {name} is {found}, "
                f"{CERTIFICATE} tells {expected!r:.70}"
            )


def check_sums(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Raise a ValueError if SHA256SUMS is not of these and the other files; give their digests."""
    listed = summed(path)
    found = b""
    if (path / SUMS).stat().st_size == sum(len(_line(name, "0" * 64)) for name in listed):
        found = (path / SUMS).read_bytes()
    lines = found.decode("ascii", "replace").splitlines(keepends=True)
    digests = {name: sha256(path / name) for name in names}
    changed = [name for name, digest in digests.items() if _line(name, digest) not in lines]
    if changed or [line[64:] for line in lines] != [_line(name, "") for name in listed]:
        raise ValueError(
            f"{path} was changed: {SUMS} does not tell the SHA-256 of {', '.join(changed) or 'it'}"
        )
    return digests


def sums(path: Path) -> list[str]:
    """The lines of SHA256SUMS."""
    return [_line(name, sha256(path / name)) for name in summed(path)]


def summed(path: Path) -> list[str]:
    """The files in SHA256SUMS: all but the model card, which people may edit."""
    return sorted(n for n in (CERTIFICATE, CONFIG, PLAN, WEIGHTS) if (path / n).is_file())


def _line(name: str, digest: str) -> str:
    return f"{digest}  {name}\n"

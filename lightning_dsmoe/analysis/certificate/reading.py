"""Reading a certificate, which may come from a stranger."""

from typing import Annotated, Any, get_type_hints

from lightning_dsmoe import reading
from lightning_dsmoe.analysis.certificate.judgement import Judgement
from lightning_dsmoe.analysis.certificate.mixtures import MixtureErrors
from lightning_dsmoe.analysis.certificate.record import FORMAT_VERSION, TextSource
from lightning_dsmoe.inference.artifact.hashes import CONFIG, PLAN, WEIGHTS

_LAYERS = Annotated[list[MixtureErrors | None], reading.Bounds(0, reading.MAX_LAYERS)]
_FIELDS = {
    "format_version": int,
    **get_type_hints(Judgement),
    "tokens": reading.Count,
    "windows": reading.Count,
    "experts": _LAYERS,
    "attention": _LAYERS,
    "data": {
        **get_type_hints(TextSource),
        "context": reading.Size,
        "batch_tokens": reading.Size,
        "fingerprint": reading.ShortText,
    },
    "checkpoint_sha256": reading.ShortText | None,
    "versions": dict.fromkeys(("lightning_dsmoe", "torch", "python"), reading.ShortText),
    "date": reading.ShortText,
    "sha256": dict.fromkeys((CONFIG, PLAN, WEIGHTS), reading.ShortText),
}


def read_certificate(name: str, data: object) -> dict[str, Any] | None:
    """Check a certificate from an artifact.

    Args:
        name: what errors call it.
        data: what was read from JSON; None if the artifact has no certificate.

    Returns:
        The certificate, or None.

    Raises:
        ValueError: if it is invalid or of another format; names the field at fault.
    """
    if data is None:
        return None
    reading.check_version(name, data, FORMAT_VERSION)
    certificate: dict[str, Any] = reading.check_json(name, data, _FIELDS)
    return certificate

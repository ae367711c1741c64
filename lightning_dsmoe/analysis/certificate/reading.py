"""Reading a certificate, which may come from a stranger."""

from collections.abc import Callable, Mapping
from reprlib import repr as short_repr
from typing import Any, get_args

from lightning_dsmoe.analysis.certificate.judgement import Judgement
from lightning_dsmoe.analysis.certificate.mixtures import MixtureErrors
from lightning_dsmoe.analysis.certificate.record import FORMAT_VERSION, Source

_MAX_LAYERS = 1024
_MAX_TEXT = 200
_MOST = 1e300

Kind = tuple[str, Callable[[Any], bool]]
"""What a field holds, in words and as a test."""


def read_certificate(name: str, data: object) -> dict[str, Any] | None:
    """Check a certificate out of an artifact.

    Args:
        name: what errors call it.
        data: what was read from JSON; None if there was nothing.

    Returns:
        The certificate; None for nothing.

    Raises:
        ValueError: if it is broken or of another format, naming the field at fault.
    """
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be an object")
    if "format_version" not in data:
        raise ValueError(f"{name} is not a certificate: it has no format_version")
    if data["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{name} has format {short_repr(data['format_version'])}, this version reads "
            f"{FORMAT_VERSION}"
        )
    _check_fields(name, data, _FIELDS)
    for part, fields in _PARTS.items():
        _check_fields(f"{name}, {part}", data[part], fields)
    return data


def _check_fields(name: str, data: Mapping[str, Any], fields: Mapping[str, Kind]) -> None:
    wrong = sorted(set(data) ^ set(fields))
    if wrong:
        raise ValueError(
            f"{name} must have the fields {', '.join(fields)}; missing or unknown: "
            f"{short_repr(wrong)}"
        )
    for field, (what, fits) in fields.items():
        if not fits(data[field]):
            raise ValueError(f"{name}: {field} must be {what}, got {short_repr(data[field])}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < _MOST


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _is_mixtures(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_LAYERS
        and all(each is None or _is_numbers(each) for each in value)
    )


def _is_numbers(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(MixtureErrors._fields)
        and all(map(_is_number, value.values()))
    )


_COUNT: Kind = ("a whole number", _is_count)
_SIZE: Kind = (
    "a whole number of at least 1",
    lambda value: _is_count(value) and value >= 1,
)
_NUMBER: Kind = ("a number", _is_number)
_MAYBE_NUMBER: Kind = ("null or a number", lambda value: value is None or _is_number(value))
_TEXT: Kind = ("a text", _is_text)
_MAYBE_TEXT: Kind = ("null or a text", lambda value: value is None or _is_text(value))
_OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))
_MIXTURES: Kind = ("a list of null or errors of a mixture", _is_mixtures)
_INTERVAL: Kind = (
    "null or two numbers",
    lambda value: (
        value is None
        or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))
    ),
)


def _one_of(*allowed: str) -> Kind:
    return " or ".join(allowed), lambda value: isinstance(value, str) and value in allowed


_FIELDS: dict[str, Kind] = {
    "format_version": _COUNT,
    **dict.fromkeys(Judgement._fields, _NUMBER),
    "tokens": _COUNT,
    "windows": _COUNT,
    "dense": _one_of("checkpoint", "artifact"),
    "relative_gap_95": _INTERVAL,
    "all_experts_error": _MAYBE_NUMBER,
    "loss_before_quantization": _MAYBE_NUMBER,
    "routing_agreement": _MAYBE_NUMBER,
    "experts": _MIXTURES,
    "attention": _MIXTURES,
    "data": _OBJECT,
    "checkpoint_sha256": _MAYBE_TEXT,
    "versions": _OBJECT,
    "date": _TEXT,
    "sha256": _OBJECT,
}
_PARTS: dict[str, dict[str, Kind]] = {
    "data": {
        "source": _one_of(*get_args(Source)),
        "split": _one_of("val", "test"),
        "val_fraction": _MAYBE_NUMBER,
        "test_fraction": _MAYBE_NUMBER,
        "context": _SIZE,
        "batch_tokens": _SIZE,
        "fingerprint": _TEXT,
    },
    "versions": {"lightning_dsmoe": _TEXT, "torch": _TEXT, "python": _TEXT},
    "sha256": dict.fromkeys(("config.json", "plan.json", "model.safetensors"), _TEXT),
}

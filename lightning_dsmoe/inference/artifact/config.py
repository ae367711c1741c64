"""The configuration in an artifact, checked before anything is built of it."""

from pathlib import Path

from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.serialization.checkpoint import check_text_options

FORMAT_VERSION = 2
_CONFIG_FIELDS = {
    "format_version",
    "architecture",
    "quantization",
    "quantize_head",
    "switch_points",
    "context",
    "tokenizer",
}


def check_config(path: Path, config: object) -> None:
    """Raise a ValueError that names the file if what it holds is not a configuration."""
    if not isinstance(config, dict) or "format_version" not in config:
        raise ValueError(f"{path} must be an object with a format_version")
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {config['format_version']!r:.20}, this version reads "
            f"{FORMAT_VERSION}; another version of lightning_dsmoe may read it"
        )
    if set(config) != _CONFIG_FIELDS:
        raise ValueError(f"{path} must have the fields {sorted(_CONFIG_FIELDS)}")
    if config["quantization"] not in (None, "int8"):
        raise ValueError(
            f"{path}: quantization must be null or int8, got {config['quantization']!r:.200}"
        )
    if not isinstance(config["quantize_head"], bool):
        raise ValueError(f"{path}: quantize_head must be true or false")
    _check_switch_points(path, config["switch_points"])
    try:
        check_text_options(config["tokenizer"], config["context"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_switch_points(path: Path, points: object) -> None:
    if not isinstance(points, dict) or set(points) != set(SwitchPoints._fields):
        raise ValueError(f"{path}: switch_points must have the fields {SwitchPoints._fields}")
    for name in ("gather_up_to", "grouped_from"):
        if type(points[name]) is not int or points[name] < 0:
            raise ValueError(
                f"{path}: {name} must be a whole number of 0 or more, got {points[name]!r:.200}"
            )
    if not isinstance(points["measured_on"], str | None):
        raise ValueError(f"{path}: measured_on must be null or a text")

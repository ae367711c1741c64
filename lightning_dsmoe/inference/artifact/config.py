"""The configuration in an artifact, checked before anything is built of it."""

from pathlib import Path
from typing import Literal, get_type_hints

from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.reading import Count, check_json, check_version
from lightning_dsmoe.serialization.checkpoint import TEXT_FIELDS

FORMAT_VERSION = 2
_FIELDS = {
    "format_version": int,
    "architecture": dict,  # which `build_decoder` checks
    "quantization": Literal["int8"] | None,
    "quantize_head": bool,
    "switch_points": {
        **get_type_hints(SwitchPoints),
        "gather_up_to": Count,
        "grouped_from": Count,
    },
    **TEXT_FIELDS,
}


def check_config(path: Path, config: object) -> None:
    """Raise a ValueError that names the file and the field if this is no configuration."""
    check_version(str(path), config, FORMAT_VERSION)
    check_json(str(path), config, _FIELDS)

"""The directory of an exported model: written beside its place, then renamed."""

import json
import re
from contextlib import AbstractContextManager
from pathlib import Path

from lightning_dsmoe.files import check_place
from lightning_dsmoe.folders import replaced_folder
from lightning_dsmoe.version import VERSION

_MARK = "exported_by"
SIGNATURE = {_MARK: f"lightning_dsmoe {VERSION}"}
"""The field of `config.json` that says that a directory is an earlier export."""
_OURS = re.compile(
    r"(generation_)?config\.json|tokenizer(_config)?\.json|README\.md|frontier\.png"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(configuration|modeling)_\w+\.py"
)


def check_replaceable(path: Path) -> None:
    """Raise an error unless a path is free, an empty directory, or an earlier export."""
    check_place(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        is_export = _MARK in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        is_export = False
    if not is_export:
        raise FileExistsError(
            f"{path} is neither empty nor an earlier export of lightning_dsmoe; choose another path"
        )


def replaced_directory(path: Path) -> AbstractContextManager[Path]:
    """A hidden directory that becomes an export, in which people's own files stay."""
    return replaced_folder(path, is_ours=lambda name: _OURS.fullmatch(name) is not None)

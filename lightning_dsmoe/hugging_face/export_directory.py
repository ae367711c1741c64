"""The directory of an exported model: written beside its place, then renamed."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_dsmoe.files import hidden_beside, replace_folder
from lightning_dsmoe.inference.artifact.directory import copy_linked

MARK = "exported_by"
"""A field of `config.json` that says that a directory is an earlier export."""
_OURS = re.compile(
    r"(generation_)?config\.json|tokenizer(_config)?\.json|README\.md|frontier\.png"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(configuration|modeling)_\w+\.py"
)


def check_replaceable(path: Path) -> None:
    """Raise a FileExistsError unless a path is free, an empty directory, or an earlier export."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        is_export = MARK in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        is_export = False
    if not is_export:
        raise FileExistsError(
            f"{path} is neither empty nor an earlier export of lightning_dsmoe; choose another path"
        )


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yield a hidden directory beside a path, and rename it to the path if the block succeeds.

    The files of an earlier export are replaced; what people put beside them stays.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = hidden_beside(path)
    try:
        if path.exists():
            ours = {each.name for each in path.iterdir() if _OURS.fullmatch(each.name)}
            copy_linked(path, folder, without=ours)
        folder.mkdir(exist_ok=True)
        yield folder
        replace_folder(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

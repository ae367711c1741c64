"""The map of the files is that of the tree."""

import re

from .page import ROOT

PAGE = (ROOT / "docs/concepts/architecture.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "lightning_dsmoe"


def test_what_the_page_names_exists() -> None:
    named = re.findall(r"`([\w/]+(?:/|\.py))`", PAGE)
    folders = {"", *(name for name in named if name.endswith("/"))}
    missing = [
        name
        for name in named
        if not any(
            (root / folder / name).exists() for root in (PACKAGE, ROOT) for folder in folders
        )
    ]
    assert len(named) > 50
    assert not missing


def test_the_page_names_all_folders_and_the_files_beside_them() -> None:
    found = [path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    parts = [f"`{folder.relative_to(PACKAGE).as_posix()}/`" for folder in found]
    parts += [f"`{path.name}`" for path in PACKAGE.glob("*.py") if not path.name.startswith("_")]
    assert not [part for part in parts if part not in PAGE]

"""The README says what is there; `docs/test_pages.py` runs its blocks."""

import re
from typing import Any

from .docs.page import ROOT, blocks, commands

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_layer_learns_and_routes() -> None:
    [code] = [b.text for b in blocks(README) if "MixtureOfExperts(256, 16, 64)" in b.text]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["moe"].router.weight.grad.abs().sum() > 0
    assert names["routing"].probs.shape == (8, 32, 16)


def test_what_is_named_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = commands(README, "make")
    assert named
    assert {word for words in named for word in words} <= set(targets)
    links = re.findall(r"\]\(([^)]+)\)", README)
    missing = [
        link
        for link in links
        if not link.startswith("https://") and not (ROOT / link.partition("#")[0]).is_file()
    ]
    assert not missing


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120

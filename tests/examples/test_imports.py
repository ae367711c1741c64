"""What only the examples need is not needed by the library."""

import re

import pytest

from ..docs.page import ROOT

LIBRARY = [
    *ROOT.glob("lightning_dsmoe/**/*.py"),
    *ROOT.glob("callbacks/*.py"),
]


@pytest.mark.parametrize("package", ["transformers", "accelerate", "sklearn"])
def test_the_library_never_imports(package: str) -> None:
    imports = re.compile(rf"^\s*(?:import|from) {package}\b", re.MULTILINE)
    assert len(LIBRARY) > 100
    assert [path.name for path in LIBRARY if imports.search(path.read_text("utf-8"))] == []

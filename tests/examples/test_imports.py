"""What is optional is imported where it is used, and what only the examples need nowhere."""

import re

import pytest

from ..docs.page import ROOT

LIBRARY = [
    path
    for path in (*ROOT.glob("lightning_dsmoe/**/*.py"), *ROOT.glob("callbacks/*.py"))
    # Written into exported directories, for a process that has transformers.
    if path.name not in ("configuration_dsmoe.py", "modeling_dsmoe.py")
]
EXAMPLES_ONLY = ("accelerate", "sklearn")
OPTIONAL = ("transformers", "tokenizers", "huggingface_hub", "lm_eval")


def importing(package: str, indent: str) -> list[str]:
    imports = re.compile(rf"^{indent}(?:import|from) {package}\b(?!.*\{{)", re.MULTILINE)
    return [path.name for path in LIBRARY if imports.search(path.read_text("utf-8"))]


@pytest.mark.parametrize("package", EXAMPLES_ONLY)
def test_the_library_never_imports(package: str) -> None:
    assert len(LIBRARY) > 100
    assert importing(package, r"\s*") == []


@pytest.mark.parametrize("package", OPTIONAL)
def test_the_library_imports_only_inside_functions(package: str) -> None:
    assert importing(package, r"\s+") != []
    assert importing(package, "") == []

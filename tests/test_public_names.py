"""What `import lightning_dsmoe` offers, of which it imports nothing by itself."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lightning_dsmoe

SOURCE = Path(lightning_dsmoe.__file__)


def test_all_public_names_can_be_imported_at_once() -> None:
    found: dict[str, object] = {}
    exec("from lightning_dsmoe import *", found)
    assert set(found) - {"__builtins__"} == set(lightning_dsmoe.__all__)


def test_type_checkers_see_what_is_imported_on_use() -> None:
    [block] = [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If)][1:]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module or "" for node in imports for alias in node.names}
    assert {"__version__", *seen} == set(lightning_dsmoe.__all__)
    for name, module in seen.items():
        assert getattr(lightning_dsmoe, name) is getattr(import_module(module), name)
    assert set(lightning_dsmoe.__all__) <= set(dir(lightning_dsmoe))


def test_modules_are_found_without_being_imported() -> None:
    code = """
import lightning_dsmoe
print(lightning_dsmoe.routing.TopK is lightning_dsmoe.TopK)
print([getattr(lightning_dsmoe, name).__name__ for name in lightning_dsmoe._SUBMODULES])
"""
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, capture_output=True, text=True, cwd=SOURCE.parents[1])
    names = [f"lightning_dsmoe.{name}" for name in lightning_dsmoe._SUBMODULES]
    assert run.stdout == f"True\n{names}\n", run.stderr


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(AttributeError, match="'lightning_dsmoe' has no attribute 'Absent'"):
        lightning_dsmoe.Absent  # noqa: B018

"""The `configs` tool."""

from pathlib import Path
from typing import Any


def test_lists_every_configuration(cli: Any, config: Any) -> None:
    listed = dict(line.split(maxsplit=1) for line in cli("configs").out.splitlines())
    root = Path(config("quickstart.yaml")).parent
    assert set(listed) == {str(path.relative_to(root)) for path in root.rglob("*.yaml")}
    assert all(Path(path).is_file() for path in listed.values())


def test_prints_one(cli: Any, config: Any) -> None:
    name = "callbacks/annealing.yaml"
    assert cli("configs", f"--name={name}").out == Path(config(name)).read_text()

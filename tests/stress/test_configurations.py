"""Configurations with mistakes end in one line that names the option or the file, and code 2."""

import contextlib
import random
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..commands.conftest import run
from .amount import number
from .mutations import mutated_bytes, mutated_data

QUICKSTART = Path(str(files("lightning_dsmoe.cli_configs").joinpath("quickstart.yaml")))


def forged(configuration: Path, random: random.Random) -> bytes:
    """A configuration with a few fields or bytes changed."""
    whole = configuration.read_bytes()
    if random.random() < 0.4:
        return mutated_bytes(whole, random)
    try:
        changed = mutated_data(yaml.safe_load(whole), random)
        return yaml.safe_dump(changed, sort_keys=False).encode(errors="surrogatepass")
    except RecursionError:  # the value is deeper than YAML is written
        return b"trainer: " + b"[" * 3000 + b"]" * 3000


def options_of(*paths: Path) -> list[Any]:
    """What those files hold that can be read."""
    found = []
    for path in paths:
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            found.append(yaml.safe_load(path.read_bytes()))
    return [options for options in found if isinstance(options, dict | list)]


def keys(options: Any) -> Iterator[str]:
    """Names of options at all depths."""
    if isinstance(options, dict):
        yield from map(str, options)
    for value in options.values() if isinstance(options, dict) else options:
        if isinstance(value, dict | list):
            yield from keys(value)


def names_one(said: str, names: set[str]) -> bool:
    """Whether a message has one of these names as a word, and not as a part of another one."""
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said) for name in names if name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forged_configurations(tmp_path: Path) -> None:
    configurations = sorted(QUICKSTART.parent.rglob("*.yaml"))
    path = tmp_path / "forged.yaml"
    accepted, faults = 0, []
    for seed in range(count := number(15, of=500)):
        source = random.Random(seed)
        chosen = source.choice(configurations)
        path.write_bytes(forged(chosen, source))
        before = () if chosen == QUICKSTART else ("-c", str(QUICKSTART))
        outcome = run("fit", *before, "-c", str(path), "--print_config")
        accepted += outcome.code == 0
        said = outcome.err.strip()
        named = {path.name, "model", "data", "trainer", *keys(options_of(chosen, path))}
        is_answer = said.startswith("lightning-dsmoe: error: ") and "\n" not in said
        if outcome.code and not (outcome.code == 2 and is_answer and names_one(said, named)):
            faults.append(f"{seed}, {chosen.name}: {outcome.code}, {said[:500]}")
    print(f"{accepted} of {count} accepted, {count - accepted} refused")
    assert not faults, f"{len(faults)}: " + "\n".join(faults[:10])

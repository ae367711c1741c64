"""The lock that `make test` installs from has every package with its hashes, as constraints.txt."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements-dev.lock").read_text()
LOCKED = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE))


def test_versions_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(each.name): str(each.specifier) for each in pinned}
    named = LOCKED.keys() & versions.keys()
    assert {name: versions[name] for name in named} == {n: f"=={LOCKED[n]}" for n in named}
    # Of packages that other systems than Linux need.
    assert {"httpx2-jsfetch"} >= LOCKED.keys() - named


def test_every_package_has_hashes_and_none_is_a_part_of_pytorch() -> None:
    blocks = re.split(r"\n(?=[\w.-]+==)", LOCK)[1:]
    assert len(blocks) == len(LOCKED) > 80
    assert [
        block for block in blocks if not re.search(r"\n +--hash=sha256:[0-9a-f]{64}", block)
    ] == []
    assert [name for name in LOCKED if re.match("torch$|triton|nvidia|cuda", name)] == []


def test_it_holds_what_the_project_and_its_tests_ask_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name != "torch":
            assert requirement.specifier.contains(LOCKED[name]), f"make lock: {requirement}"


def test_no_place_of_a_machine_is_written_down() -> None:
    assert not re.search(r"(?m)^-|file:|https?:", LOCK)

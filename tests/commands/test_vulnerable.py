"""Vulnerable packages are named before anything is done."""

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from lightning_dsmoe.commands import vulnerable
from lightning_dsmoe.commands.vulnerable import VULNERABILITIES, floor, vulnerable_packages


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> list[str]:
    def version(package: str) -> str:
        try:
            return versions[package.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(package) from None

    monkeypatch.setattr(vulnerable, "version", version)
    return list(vulnerable_packages())


def test_what_is_installed_here_has_none() -> None:
    assert list(vulnerable_packages()) == []


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"lightning": "2.6.5"}, "lightning 2.6.5 runs code that a checkpoint names"),
        ({"pytorch_lightning": "1.9.0"}, "pytorch-lightning 1.9.0 runs code that a checkpoint"),
        ({"lightning": "2.6.3"}, "lightning 2.6.3 was published by a thief and steals credentials"),
        ({"torch": "2.5.1+cpu"}, "torch 2.5.1+cpu runs code in a checkpoint"),
        ({"torch": "2.9.1"}, "torch 2.9.1 can be made to write beyond its memory"),
    ],
)
def test_a_vulnerable_version_is_named(
    versions: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [line] = installed(monkeypatch, **versions)
    assert line.startswith(said)
    assert line.endswith(" or newer")
    assert "\n" not in line


def test_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    safe = {"lightning": "2.6.6", "pytorch_lightning": "2.7.0rc1", "torch": "2.10.0+cu128"}
    assert installed(monkeypatch, **safe) == []
    assert installed(monkeypatch, torch="a build of my own") == []
    assert installed(monkeypatch) == []


def test_the_ranges_of_the_package_exclude_all_of_them() -> None:
    path = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    ranges = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    for each in VULNERABILITIES:
        assert floor(each.package) in ranges[each.package]
        assert not each.is_in(floor(each.package))
        assert not any(bad in ranges[each.package] for bad in (*each.only, "1.0"))


def test_the_command_line_says_so(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vulnerable, "version", lambda package: "2.6.5")
    outcome = cli("configs")
    assert outcome.code == 0
    assert [line for line in outcome.err.splitlines() if "2.6.5" in line] == [
        f"lightning-dsmoe: warning: {line}" for line in vulnerable_packages()
    ]


def test_of_several_processes_only_the_first_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vulnerable, "version", lambda package: "2.6.5")
    for rank, n_lines in (("0", len(list(vulnerable_packages()))), ("3", 0)):
        monkeypatch.setenv("SLURM_PROCID", rank)
        vulnerable.warn_of_vulnerable_packages()
        assert capsys.readouterr().err.count("lightning-dsmoe: warning: ") == n_lines


def test_a_variable_of_that_name_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "captain")
    vulnerable.warn_of_vulnerable_packages()

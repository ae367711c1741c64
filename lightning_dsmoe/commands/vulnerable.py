"""Installed packages with known vulnerabilities that reading a checkpoint can meet.

The ranges in pyproject.toml exclude them, but `pip install --no-deps`, or another package that is
installed later, can bring one back.
"""

import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from packaging.version import InvalidVersion, Version


class Vulnerability(NamedTuple):
    """What is wrong with a package.

    Args:
        package: its name.
        before: the first version without it.
        what: what can happen, with the number under which it is known.
        only: the versions that have it; all earlier ones if there are none.
    """

    package: str
    before: str
    what: str
    only: tuple[str, ...] = ()

    def is_in(self, installed: str) -> bool:
        """Whether a version has it; a local build counts as the version that it was built from."""
        try:
            found = Version(installed)
        except InvalidVersion:
            return False
        public = Version(found.public)
        if self.only:
            return public in map(Version, self.only)
        return public < Version(self.before)


_MALICIOUS = "was published by a thief and steals credentials when it is imported: replace them all"
_CODE = "runs code that a checkpoint names, even where it is read as data only (CVE-2026-58659)"
VULNERABILITIES = (  # of each package the worst first
    Vulnerability("lightning", "2.6.6", _MALICIOUS, ("2.6.2", "2.6.3")),
    Vulnerability("pytorch-lightning", "2.6.6", _MALICIOUS, ("2.6.2", "2.6.3")),
    Vulnerability("lightning", "2.6.6", _CODE),
    Vulnerability("pytorch-lightning", "2.6.6", _CODE),
    Vulnerability("torch", "2.6", "runs code in a checkpoint read as data only (CVE-2025-32434)"),
    Vulnerability(
        "torch", "2.10", "can be made to write beyond its memory by a checkpoint (CVE-2026-24747)"
    ),
)

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Variables with the number of a process, which torchrun, Lightning and SLURM set."""


def floor(package: str) -> str:
    """The first version of a package without any of its vulnerabilities."""
    return max((each.before for each in VULNERABILITIES if each.package == package), key=Version)


def warn_of_vulnerable_packages() -> None:
    """Name vulnerable packages, by the first of the processes of a run alone."""
    numbers = [os.environ.get(name, "") for name in _RANKS]
    if any(number.isdecimal() and int(number) for number in numbers):  # others name them too
        return
    for line in vulnerable_packages():
        print(f"lightning-dsmoe: warning: {line}", file=sys.stderr)


def vulnerable_packages() -> Iterator[str]:
    """One line for each installed package with a known vulnerability; reads versions only."""
    told: set[str] = set()
    for each in VULNERABILITIES:
        try:
            installed = version(each.package)
        except PackageNotFoundError:
            continue
        if each.package not in told and each.is_in(installed):
            told.add(each.package)
            yield f"{each.package} {installed} {each.what}; take {floor(each.package)} or newer"

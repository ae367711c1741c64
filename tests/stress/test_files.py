"""Files of strangers end in what they held, or in one line; nothing crashes, hangs or swells."""

import sys
from pathlib import Path

import pytest

from .amount import number
from .readers import READERS
from .worker import stress

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs limits of Linux"),
    pytest.mark.timeout(7200),
]


@pytest.mark.parametrize("reader", READERS)
def test_forged_files(reader: str, tmp_path: Path) -> None:
    found = stress(reader, tmp_path, first=0, count=number(60, of=10_000))
    print(f"{reader}: {found['accepted']} accepted, {found['refused']} refused")
    assert found["accepted"] > 0  # what is forged is close to what is read
    assert not found["faults"], f"{len(found['faults'])}: " + "\n".join(found["faults"][:10])

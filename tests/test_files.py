import os
from pathlib import Path

import pytest

from lightning_dsmoe.files import atomic_path, write_text


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_writes_a_file_and_the_folders_above_it(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_and_look(tmp_path, umask)
    finally:
        os.umask(before)


def write_and_look(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a" / "b" / "text.txt"
    write_text(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("old")

    def fail_halfway() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            assert temporary.parent == path.parent
            assert path.read_text() == "old"
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

import errno
import os
from pathlib import Path

import pytest

from lightning_dsmoe.files import atomic_path, check_file, check_place, write_text
from lightning_dsmoe.folders import replaced_folder


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


@pytest.mark.parametrize("place", ["file", "missing"])
def test_a_place_that_cannot_be_written_is_known_before(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inside = {"file": tmp_path / "file" / "a" / "plan.json", "missing": Path("/proc/a/plan.json")}
    with pytest.raises(ValueError, match=r"plan\.json cannot be written: /\w+"):
        check_file(str(inside[place]))
    check_place(tmp_path / "new" / "folder" / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_that_is_a_folder_or_nothing(tmp_path: Path) -> None:
    for output in (str(tmp_path), ""):
        with pytest.raises(ValueError, match=r"output must be a file, \S+ is a folder"):
            check_file(output)


def test_a_folder_that_is_called_tilde_is_never_made() -> None:
    for output in ("~/plan.json", "~"):
        with pytest.raises(ValueError, match="would be a folder here that is called ~"):
            check_file(output)


def test_a_name_that_begins_with_a_tilde_is_one_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_file("~backup of nobody.json")


def test_an_output_that_is_also_read(tmp_path: Path) -> None:
    path, link = tmp_path / "last.ckpt", tmp_path / "link.ckpt"
    path.write_text("weights")
    link.symlink_to(path)
    with pytest.raises(ValueError, match=r"another file than \S+last\.ckpt, which would be lost"):
        check_file(str(link), None, str(tmp_path / "absent"), str(path))
    check_file(str(tmp_path / "plan.json"), str(path))


@pytest.mark.parametrize("names", ["none", "one", "copied"])
def test_a_full_disk_names_what_was_asked_for(names: str, tmp_path: Path) -> None:
    def fill(temporary: Path) -> None:
        part = str(temporary / "part")
        given = {"none": [], "one": [part], "copied": ["source", None, part]}[names]
        raise OSError(errno.ENOSPC, "No space left on device", *given)

    def of_file() -> None:
        with atomic_path(tmp_path / "plan.json") as temporary:
            fill(temporary)

    def of_folder() -> None:
        with replaced_folder(tmp_path / "plan.json", is_ours=lambda name: True) as temporary:
            fill(temporary)

    for write in (of_file, of_folder):
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        assert str(caught.value).endswith(
            f"No space left on device: {str(tmp_path / 'plan.json')!r}"
        )
        assert not list(tmp_path.iterdir())


def test_an_error_of_another_file_keeps_its_name(tmp_path: Path) -> None:
    def read_another() -> None:
        with atomic_path(tmp_path / "plan.json"):
            (tmp_path / "absent.txt").read_text()

    with pytest.raises(FileNotFoundError) as caught:
        read_another()
    assert caught.value.filename == str(tmp_path / "absent.txt")

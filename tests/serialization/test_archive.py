"""Archives that are damaged, packed again, or larger once they are read."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_dsmoe.serialization.archive import check_archive

Change = Callable[[bytes], bytes]


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    torch.save({"weight": torch.arange(20.0), "name": "x"}, tmp_path / "whole.ckpt")
    return (tmp_path / "whole.ckpt").read_bytes()


def pack(archive: bytes, *, compression: int = zipfile.ZIP_STORED, times: int = 1) -> bytes:
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as source,
        zipfile.ZipFile(packed, "w", compression) as target,
    ):
        for record in source.infolist() * times:
            target.writestr(record.filename, source.read(record))
    return packed.getvalue()


def test_archives_of_torch(whole: bytes, tmp_path: Path) -> None:
    check_archive(str(tmp_path / "whole.ckpt"))
    opened = io.BytesIO(whole)
    check_archive(opened)
    assert torch.load(opened)["name"] == "x"
    check_archive(io.BytesIO(pack(whole)))


def test_an_archive_with_64_bit_sizes(whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)  # as if it had more than 16 bits count
    large = pack(whole)
    assert large[-42:].startswith(b"PK\6\7")
    check_archive(io.BytesIO(large))
    assert torch.load(io.BytesIO(large))["name"] == "x"
    with pytest.raises(ValueError, match="does not end as an archive"):
        check_archive(io.BytesIO(b"script" + large))


def test_every_flipped_bit_that_changes_what_is_loaded_is_found(whole: bytes) -> None:
    found = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        try:
            check_archive(io.BytesIO(changed))
        except ValueError:
            found += 1
            continue
        try:
            loaded = torch.load(io.BytesIO(changed))
        except Exception:
            continue
        assert loaded["name"] == "x", place
        assert torch.equal(loaded["weight"], torch.arange(20.0)), place
    assert found > len(whole) / 3  # the rest is padding


def folder_record(archive: bytes) -> bytes:
    """Mark the last record of the list as a folder, of which PyTorch then reads nothing."""
    changed = bytearray(archive)
    changed[archive.rindex(b"PK\1\2") + 38] |= 0x10
    return bytes(changed)


def two_lists(archive: bytes) -> bytes:
    """Let one reader find a list of records by its place, and another one by the end."""
    end = struct.unpack("<4s4H2LH", archive[-22:])
    size, place = end[5], end[6]
    records = archive[place : place + size]
    return archive[:place] + records + records + archive[-22:]


def test_a_file_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.zeros(3), tmp_path / "file.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    check_archive(tmp_path / "file.ckpt", checksums=False)
    with pytest.raises(ValueError, match="does not match its checksum"):
        check_archive(tmp_path / "file.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: pack(whole, compression=zipfile.ZIP_DEFLATED), "data.pkl' is compressed"),
        (lambda whole: pack(whole, compression=zipfile.ZIP_LZMA), "data.pkl' is compressed"),
        (folder_record, "is encrypted or a folder"),
        (two_lists, "does not end as an archive of torch.save"),
        (lambda whole: b"script" + whole, "does not end as an archive"),
        (lambda whole: whole + b"more", "does not end as an archive"),
        (lambda whole: whole[:-1], "not a whole archive of torch.save"),
        (lambda whole: b"", "not a whole archive of torch.save"),
        (lambda whole: b"\x80\x02}.", "not a whole archive of torch.save"),
    ],
    ids=["deflate", "lzma", "folder", "lists", "before", "behind", "cut", "empty", "pickle"],
)
def test_archives_that_are_refused(change: Change, message: str, whole: bytes) -> None:
    with pytest.raises(ValueError, match=message):
        check_archive(io.BytesIO(change(whole)), checksums=False)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_of_one_name_and_records_in_one_place(whole: bytes) -> None:
    with pytest.raises(ValueError, match="same name"):
        check_archive(io.BytesIO(pack(whole, times=2)))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data", bytes(1000))
        for copy in range(99):  # listed again, under another name
            record = zipfile.ZipInfo(f"data{copy}")
            record.header_offset = 0
            record.file_size = record.compress_size = 1000
            record.CRC = archive.infolist()[0].CRC
            archive.filelist.append(record)
    with pytest.raises(ValueError, match=r"larger than the \d+ bytes of the file"):
        check_archive(packed)


@pytest.mark.parametrize("place", [2**31, 2**62, 2**63])
def test_a_record_beyond_the_end_is_the_fault_of_the_file(place: int, tmp_path: Path) -> None:
    """Seeking there is an OSError, which readers take for a fault of the disk."""
    with zipfile.ZipFile(tmp_path / "file.ckpt", "w") as archive:
        archive.writestr("data", b"some bytes")
        archive.infolist()[0].header_offset = place
    with pytest.raises(ValueError, match=r"'data' lies beyond the \d+ bytes of the file"):
        check_archive(tmp_path / "file.ckpt")

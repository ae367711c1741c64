"""The zip archive of a checkpoint, checked before `torch.load` reads anything in it.

`weights_only=True` stops code in a checkpoint, but not a file that is built to fill the memory, or
to be read differently than it was checked. `torch.load` inflates compressed records without a
limit, or maps them into memory as if they were not compressed, and never compares a checksum.
"""

import struct
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch

_CHUNK_BYTES = 2**20
_ENCRYPTED = 1
_FOLDER = 0x10  # of such a record, PyTorch 2.13 returns memory that was never written
_END = struct.Struct("<4s4H2LH")  # of the archive
_END_64 = struct.Struct("<4sQ2H2L4Q")  # the same with 64 bits
_LOCATOR_64 = struct.Struct("<4sLQL")  # where that one is
_IN_64_BITS = 2**32 - 1


def check_archive(path: str | Path | IO[Any], *, checksums: bool = True) -> None:
    """Refuse a file that `torch.load` would read wrongly, or into more memory than the file takes.

    Args:
        path: the file; an open one is rewound.
        checksums: compare every checksum, which reads the whole file, about a second per GB.

    Raises:
        ValueError: if the file is no zip archive, is incomplete or damaged, or holds records that
            are compressed, encrypted, folders, of one name, or in sum larger than the file.
    """
    try:
        with (
            Path(path).open("rb") if isinstance(path, str | Path) else nullcontext(path) as file,
            ZipFile(file) as archive,
        ):
            _check_end(file, archive.start_dir)
            _check_records(archive, file.seek(0, 2))
            damaged = _damaged_record(archive) if checksums else None
            file.seek(0)
    except (BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise ValueError(f"it is not a whole archive of torch.save ({error})") from None
    if damaged is not None:
        raise ValueError(f"{damaged!r:.200} does not match its checksum")


def load_archive(
    path: str | Path | IO[Any], *, weights_only: bool, map_location: Any = "cpu", **options: Any
) -> Any:
    """`torch.load` of a file that has been checked, which is refused first if it is to run code.

    `torch.load` refuses functions and classes itself, but searches its own message, which holds the
    name as the file has it, in a time that grows faster than the square of its length: minutes for
    300 kB. Of other values that its messages may hold, which take as long, this knows nothing.

    Args:
        path: the file; an open one is at its beginning.
        weights_only: refuse a file that holds more than data; off, it can run any code.
        map_location: device for the tensors, or what else `torch.load` takes.
        **options: further arguments of `torch.load`.

    Raises:
        UnpicklingError: the name of a function or class that is not data.
    """
    if weights_only:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not isinstance(path, str | Path):
            path.seek(0)
        if names:
            raise UnpicklingError(min(names))
    return torch.load(path, map_location=map_location, weights_only=weights_only, **options)


def _check_records(archive: ZipFile, file_bytes: int) -> None:
    records = archive.infolist()
    for record in records:
        # A zip bomb: a record of some kB may inflate to any size.
        if record.compress_type != ZIP_STORED or record.compress_size != record.file_size:
            raise ValueError(
                f"{record.filename!r:.200} is compressed, which torch.save never does; a file that "
                "was packed again has to be written with torch.save"
            )
        if record.flag_bits & _ENCRYPTED or record.external_attr & _FOLDER or record.is_dir():
            raise ValueError(f"{record.filename!r:.200} is encrypted or a folder")
        # Seeking there may raise an OSError, as if the disk were at fault and not the file.
        if record.header_offset + record.file_size > file_bytes:
            raise ValueError(
                f"{record.filename!r:.200} lies beyond the {file_bytes} bytes of the file"
            )
    # Records that overlap are a zip bomb without compression: many names for the same bytes.
    if sum(record.file_size for record in records) > file_bytes:
        raise ValueError(f"its records are larger than the {file_bytes} bytes of the file")
    # Of two records with one name, Python may check one and PyTorch load the other.
    if len({record.filename for record in records}) < len(records):
        raise ValueError("two of its records have the same name")


def _check_end(file: IO[bytes], directory: int) -> None:
    """Raise a ValueError if readers may differ on where an archive's list of records begins.

    Python looks for it before the end of the archive, PyTorch where the end says that it is: a
    file with two lists would be checked by the one and read by the other.
    """
    file_bytes = file.seek(0, 2)
    end = _END.unpack(_read(file, file_bytes - _END.size, _END.size))
    places = {end[-2]}
    before = file_bytes - _END.size - _LOCATOR_64.size
    locator = _read(file, before, _LOCATOR_64.size) if before >= 0 else b""
    if locator.startswith(b"PK\6\7"):
        end_64 = before - _END_64.size
        places = (places - {_IN_64_BITS}) | {_END_64.unpack(_read(file, end_64, _END_64.size))[-1]}
        if _LOCATOR_64.unpack(locator)[2] != end_64:
            places = set()
    if end[0] != b"PK\5\6" or places != {directory}:
        raise ValueError("it does not end as an archive of torch.save does")


def _read(file: IO[bytes], place: int, size: int) -> bytes:
    file.seek(max(0, place))
    return file.read(size)


def _damaged_record(archive: ZipFile) -> str | None:
    """Name of the first record that does not match its checksum; None if all do."""
    for record in archive.infolist():
        try:
            with archive.open(record) as stream:
                while stream.read(_CHUNK_BYTES):
                    pass
        except BadZipFile:
            return record.filename
    return None

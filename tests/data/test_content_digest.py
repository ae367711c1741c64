import hashlib
from pathlib import Path

import pytest

from lightning_dsmoe.data import content_digest as module
from lightning_dsmoe.data.content_digest import content_digest


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in "abc"]
    for path, size in zip(paths, (100, 0, 37), strict=True):
        path.write_bytes(bytes(range(size)))
    return paths


def test_it_is_that_of_all_bytes(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert content_digest(files) == whole
    monkeypatch.setattr(module, "BLOCK_BYTES", 16)
    assert content_digest(files) == whole


def test_samples_are_even_over_all_files(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BLOCK_BYTES", 4), ("N_SAMPLES", 10), ("SAMPLED_FROM", 40)):
        monkeypatch.setattr(module, name, value)
    joined = b"".join(path.read_bytes() for path in files)  # 137 bytes in steps of 13
    samples = b"".join(joined[start : start + 4] for start in range(0, 137, 13))
    assert content_digest(files) == hashlib.sha256(samples).hexdigest()

import os
import pickle
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lightning_dsmoe.data import ByteTokenizer, CharTokenizer, Tokenizer, token_file
from lightning_dsmoe.data.corpus import find_corpus
from lightning_dsmoe.data.token_file import TokenFile, default_cache_dir, open_token_file

TEXT = "naïve café – the first\nand the second line\n" * 5


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def open_tokens(path: Path, tokenizer: Tokenizer | None = None, **options: float) -> TokenFile:
    fractions = {"val_fraction": 0.2, "test_fraction": 0.1, **options}
    corpus = find_corpus(str(path))
    return open_token_file(corpus, tokenizer, **fractions, cache_dir=path.parent / "cache")


def text_of(tokens: TokenFile) -> list[str]:
    spans = [tokens.span(split) for split in ("train", "val", "test")]
    return [tokens.tokenizer.decode(span.read(0, len(span)).tolist()) for span in spans]


@pytest.mark.parametrize("tokenizer", [None, ByteTokenizer()])
def test_splits_are_the_text_cut_by_position(text_file: Path, tokenizer: Tokenizer | None) -> None:
    for tokens in (open_tokens(text_file, tokenizer), open_tokens(text_file, tokenizer)):
        train, val, test = texts = text_of(tokens)
        assert train + val + test == TEXT
        total = len(TEXT.encode())
        assert abs(len(train.encode()) - 0.7 * total) <= 3
        assert abs(len(test.encode()) - 0.1 * total) <= 4
        for text, size in zip(texts, tokens.sizes.values(), strict=True):
            assert (size.bytes, size.characters) == (len(text.encode()), len(text))
            assert size.tokens == (len(text) if tokenizer is None else len(text.encode()))


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_smallest_element_type_that_holds_the_vocabulary(
    text_file: Path, size: int, dtype: str
) -> None:
    rest = (chr(code) for code in range(0x4E00, 0x110000) if not 0xD800 <= code < 0xE000)
    alphabet = "".join({*TEXT, *islice(rest, size - len(set(TEXT)))})
    tokens = open_tokens(text_file, CharTokenizer(alphabet))
    assert tokens.dtype == dtype
    assert "".join(text_of(tokens)) == TEXT


def test_complete_file_is_reused_and_a_change_makes_another(text_file: Path) -> None:
    first = open_tokens(text_file)
    stamp = first.path.stat().st_mtime_ns
    assert open_tokens(text_file).path == first.path
    assert first.path.stat().st_mtime_ns == stamp
    os.utime(text_file, ns=(1, 1))
    assert open_tokens(text_file).path == first.path
    others = {
        open_tokens(text_file, ByteTokenizer()).path,
        open_tokens(text_file, val_fraction=0.3).path,
    }
    assert len(others | {first.path}) == 3


@pytest.mark.parametrize("sampled_from", [0, token_file.SAMPLED_FROM])
def test_another_text_of_the_same_size_and_time_is_another(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, sampled_from: int
) -> None:
    monkeypatch.setattr(token_file, "SAMPLED_FROM", sampled_from)
    stat = text_file.stat()
    open_tokens(text_file)
    other = TEXT.replace("second", "fourth")
    text_file.write_bytes(other.encode())
    os.utime(text_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "".join(text_of(open_tokens(text_file))) == other


def test_a_large_text_that_samples_miss_has_another_time(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_file, "SAMPLED_FROM", 0)
    monkeypatch.setattr(token_file, "content_digest", lambda files: "the same")
    stat = text_file.stat()
    first = open_tokens(text_file)
    assert open_tokens(text_file).path == first.path
    time.sleep(0.02)  # a file's times have steps of some milliseconds
    os.utime(text_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_tokens(text_file).path != first.path


def test_a_large_token_file_that_was_written_to_is_made_again(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_file, "SAMPLED_FROM", 0)
    monkeypatch.setattr(token_file, "content_digest", lambda files: "the same")
    path = open_tokens(text_file).path
    good = path.read_bytes()
    time.sleep(0.02)
    path.write_bytes(bytes(reversed(good)))
    assert open_tokens(text_file).path.read_bytes() == good


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(bytes(reversed(path.read_bytes()))),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text('{"dtype": "uint8"'),
        lambda path: path.with_suffix(".json").write_text("[]"),
        lambda path: path.with_suffix(".json").write_text('{"dtype": "object", "splits": 3}'),
    ],
    ids=["truncated", "overwritten", "no tokens", "no record", "cut record", "list", "nonsense"],
)
def test_damaged_cache_is_made_again(text_file: Path, damage: object) -> None:
    first = open_tokens(text_file)
    good = first.path.read_bytes()
    assert callable(damage)
    damage(first.path)
    again = open_tokens(text_file)
    assert again.path.read_bytes() == good
    assert "".join(text_of(again)) == TEXT


def test_failure_leaves_nothing_behind(text_file: Path) -> None:
    text_file.write_bytes(TEXT.encode() + b"\0")
    with pytest.raises(ValueError, match="NUL"):
        open_tokens(text_file, ByteTokenizer())
    assert list((text_file.parent / "cache").iterdir()) == []


@pytest.mark.parametrize("place", ["file", "below a file", "read-only"])
def test_a_cache_that_cannot_be_written_names_the_ways_out(text_file: Path, place: str) -> None:
    other = text_file.with_name("other")
    other.touch()
    places = {"file": other, "below a file": other / "cache", "read-only": "/proc/cache"}
    corpus = find_corpus(text_file)
    with pytest.raises(OSError, match=r"cannot keep the tokens .* as cache_dir .* XDG_CACHE_HOME"):
        open_token_file(corpus, None, val_fraction=0.2, test_fraction=0.1, cache_dir=places[place])


def test_a_missing_home_names_the_ways_out(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without an entry
    corpus = find_corpus(text_file)
    with pytest.raises(OSError, match=r"cannot keep the tokens .* XDG_CACHE_HOME"):
        open_token_file(corpus, ByteTokenizer(), val_fraction=0.2, test_fraction=0.1)


def test_a_full_disk_names_the_ways_out(text_file: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # for what follows, 10 bytes are left
    try:
        with pytest.raises(OSError, match=r"cannot keep the tokens .* cache_dir"):
            open_tokens(text_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((text_file.parent / "cache").iterdir()) == []


def test_a_text_that_cannot_be_read_is_not_taken_for_the_cache(text_file: Path) -> None:
    corpus = find_corpus(text_file)
    text_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"text\.txt"):
        open_token_file(corpus, ByteTokenizer(), val_fraction=0.2, test_fraction=0.1)


def test_span_travels_as_a_path(text_file: Path) -> None:
    span = open_tokens(text_file).span("val")
    packed = pickle.dumps(span)
    assert len(packed) < 500
    copy = pickle.loads(packed)
    assert np.array_equal(copy.read(3, 9), span.read(3, 9))
    assert len(span.read(len(span) - 2, len(span) + 5)) == 2


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/lightning_dsmoe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/reader")
    assert default_cache_dir() == Path("/home/reader/.cache/lightning_dsmoe")

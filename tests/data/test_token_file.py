import errno
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_dsmoe.data import (
    ByteTokenizer,
    CharTokenizer,
    TextDataModule,
    Tokenizer,
    token_cache,
    token_file,
    tokenizing,
)
from lightning_dsmoe.data import (
    corpus as corpus_module,
)
from lightning_dsmoe.data.corpus import find_corpus
from lightning_dsmoe.data.token_cache import default_cache_dir, open_token_file
from lightning_dsmoe.data.token_file import SPLITS, TokenFile
from lightning_dsmoe.files import hidden_beside

TEXT = "naïve café – the first\nand the second line\n" * 5


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def open_tokens(path: Path, tokenizer: Tokenizer | None = None, **options: float) -> TokenFile:
    settings: dict[str, Any] = {"val_fraction": 0.2, "test_fraction": 0.1, **options}
    return open_token_file(
        find_corpus(str(path)), tokenizer, **settings, cache_dir=path.parent / "cache"
    )


def ids_of(tokens: TokenFile) -> list[list[int]]:
    return [span.read(0, len(span)).tolist() for span in map(tokens.span, SPLITS)]


def text_of(tokens: TokenFile) -> list[str]:
    return [tokens.tokenizer.decode(ids) for ids in ids_of(tokens)]


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


def test_splits_are_those_of_earlier_versions(text_file: Path) -> None:
    text_file.write_text("a" * 1000)
    tokens = open_tokens(text_file, ByteTokenizer(), val_fraction=0.05, test_fraction=0.05)
    assert [size.tokens for size in tokens.sizes.values()] == [899, 51, 50]  # 1 - 0.05 - 0.05 < 0.9


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


def test_complete_tokens_are_reused_and_a_change_makes_others(text_file: Path) -> None:
    first = open_tokens(text_file)
    files = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert open_tokens(text_file).folder == first.folder
    os.utime(text_file, ns=(1, 1))
    assert open_tokens(text_file).folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == files
    others = {
        open_tokens(text_file, ByteTokenizer()).folder,
        open_tokens(text_file, val_fraction=0.3).folder,
    }
    assert len(others | {first.folder}) == 3


@pytest.mark.parametrize("sampled_from", [0, token_cache.SAMPLED_FROM])
def test_another_text_of_the_same_size_and_time_is_another(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, sampled_from: int
) -> None:
    monkeypatch.setattr(token_cache, "SAMPLED_FROM", sampled_from)
    stat = text_file.stat()
    open_tokens(text_file)
    other = TEXT.replace("second", "fourth")
    text_file.write_bytes(other.encode())
    os.utime(text_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "".join(text_of(open_tokens(text_file))) == other


def test_a_large_text_that_samples_miss_has_another_time(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "SAMPLED_FROM", 0)
    monkeypatch.setattr(token_cache, "content_digest", lambda files: "the same")
    stat = text_file.stat()
    first = open_tokens(text_file)
    assert open_tokens(text_file).folder == first.folder
    time.sleep(0.02)  # a file's times have steps of some milliseconds
    os.utime(text_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_tokens(text_file).folder != first.folder


def test_a_large_token_file_that_was_written_to_is_made_again(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "SAMPLED_FROM", 0)
    for module in (token_file, tokenizing):
        monkeypatch.setattr(module, "content_digest", lambda files: "the same")
    (path, *_) = open_tokens(text_file).paths("train")
    good = path.read_bytes()
    time.sleep(0.02)
    path.write_bytes(bytes(reversed(good)))
    assert "".join(text_of(open_tokens(text_file))) == TEXT
    assert path.read_bytes() == good


def damaged(name: str, content: bytes | None) -> Callable[[Path], object]:
    """Writes to a file of a folder, or deletes it."""
    if content is None:
        return lambda folder: (folder / name).unlink()
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "train-00000.bin", 100),
        damaged("train-00000.bin", b"0" * 161),
        damaged("val-00000.bin", b""),
        damaged("val-00000.bin", None),
        damaged("tokens.json", None),
        damaged("tokens.json", b'{"dtype": "uint8"'),
        damaged("tokens.json", b"[]"),
        damaged("tokens.json", b'{"format_version": 3, "dtype": "object", "shards": 3}'),
    ],
    ids=["truncated", "other", "empty", "missing", "no index", "cut index", "list", "nonsense"],
)
def test_damaged_tokens_are_made_again(text_file: Path, damage: Callable[[Path], object]) -> None:
    first = open_tokens(text_file)
    good = {path: path.read_bytes() for path in first.folder.iterdir()}
    damage(first.folder)
    again = open_tokens(text_file)
    assert "".join(text_of(again)) == TEXT
    assert {path: path.read_bytes() for path in again.folder.iterdir()} == good


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_failure_leaves_nothing_behind(text_file: Path) -> None:
    text_file.write_bytes(TEXT.encode() + b"\0")
    with pytest.raises(ValueError, match="NUL"):
        open_tokens(text_file, ByteTokenizer(), test_fraction=0.0, val_fraction=0.9999)
    assert files_in(text_file.parent / "cache") == []


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "SHARD_BYTES", 30)
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", 30)
    monkeypatch.setattr(corpus_module, "LINE_BYTES", 11)


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_parts_join_to_the_text(text_file: Path, num_workers: int) -> None:
    for _ in range(2):
        tokens = open_tokens(text_file, num_workers=num_workers)
        assert [len(tokens.shards[split]) for split in SPLITS] == [5, 2, 1]
        assert "".join(text_of(tokens)) == TEXT
        span = tokens.span("train")
        whole = span.read(0, len(span))
        for start in range(0, len(span), 7):
            assert np.array_equal(span.read(start, start + 70), whole[start : start + 70])
        assert span.read(len(span), len(span) + 5).size == 0
        sizes = tokens.sizes["train"]
        assert (sizes.tokens, sizes.characters) == (len(span), len(text_of(tokens)[0]))


class OneTokenAPiece(ByteTokenizer):
    """Tells where it was given an end, as a tokenizer of words does whose word was cut."""

    def encode(self, text: str) -> np.ndarray:
        return np.array([len(text.encode())])


@pytest.mark.parametrize("shard_bytes", [1, 30, 100])
def test_tokens_are_those_of_one_part(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", 10)
    monkeypatch.setattr(corpus_module, "LINE_BYTES", 20)
    (tmp_path / "other.txt").write_text("x" * 50 + "\n" + TEXT, encoding="utf-8")
    files = tmp_path / "*.txt"
    whole = open_tokens(files, OneTokenAPiece())
    assert [len(shards) for shards in whole.shards.values()] == [1, 1, 1]
    expected = ids_of(whole)
    (whole.folder / token_file.INDEX).unlink()
    monkeypatch.setattr(tokenizing, "SHARD_BYTES", shard_bytes)
    parts = open_tokens(files, OneTokenAPiece())
    assert len(parts.shards["train"]) > 2
    assert ids_of(parts) == expected


class Stops(ByteTokenizer):
    """Fails at the text of some part, as a process that is killed there."""

    def encode(self, text: str) -> np.ndarray:
        if "second" in text and stops:
            raise ValueError(stops.pop())
        encoded.append(text)
        return super().encode(text)


stops: list[str] = []
encoded: list[str] = []


@pytest.mark.usefixtures("shards")
def test_finished_parts_are_kept(text_file: Path) -> None:
    text_file.write_bytes(("first\n" * 30 + "second\n").encode())
    encoded.clear()
    stops.append("stopped")
    with pytest.raises(ValueError, match=r"^stopped$"):
        open_tokens(text_file, Stops())
    before = list(encoded)
    tokens = open_tokens(text_file, Stops())
    assert len(encoded) == sum(len(shards) for shards in tokens.shards.values()) == 7
    assert "".join(text_of(tokens)) == text_file.read_text()
    # One that is damaged is made again, and no other.
    path = tokens.paths("train")[2]
    good = path.read_bytes()
    path.write_bytes(b"x" * len(good))
    open_tokens(text_file, Stops())
    assert len(encoded) == 8
    assert path.read_bytes() == good
    assert len(before) < 7


def test_what_killed_processes_left_is_deleted(text_file: Path) -> None:
    tokens = open_tokens(text_file)
    (tokens.folder / token_file.INDEX).unlink()
    old, new = (hidden_beside(tokens.paths("train")[0]) for _ in range(2))
    for path in (old, new):
        path.write_bytes(b"begun")
    os.utime(old, (0, 0))
    assert open_tokens(text_file).shards == tokens.shards
    assert not old.exists()
    assert new.exists()  # perhaps of another machine


@pytest.mark.usefixtures("shards")
def test_parts_are_few_and_those_of_another_cut_are_made_again(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = open_tokens(text_file)
    (many.folder / token_file.INDEX).unlink()
    monkeypatch.setattr(tokenizing, "MOST_SHARDS", 3)
    few = open_tokens(text_file)
    assert [len(few.shards[split]) for split in SPLITS] == [2, 1, 1]
    assert few.folder == many.folder
    assert "".join(text_of(few)) == TEXT


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_part_is_one_line(text_file: Path, num_workers: int) -> None:
    text_file.write_bytes(TEXT.encode() + b"\0")
    with pytest.raises(ValueError, match=r"text\.txt is not a text file: NUL byte at off") as error:
        open_tokens(text_file, ByteTokenizer(), num_workers=num_workers)
    assert "\n" not in str(error.value)


class Writes(ByteTokenizer):
    """Another process appends to the text meanwhile."""

    def __init__(self, path: Path) -> None:
        self.file = path

    def encode(self, text: str) -> np.ndarray:
        with self.file.open("ab") as stream:
            stream.write(b"more")
        return super().encode(text)


def test_a_text_that_changes_meanwhile_is_named(text_file: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.txt changed while it was tokenized"):
        open_tokens(text_file, Writes(text_file))
    assert "tokens.json" not in files_in(text_file.parent / "cache")


class Wrong(ByteTokenizer):
    vocab_size = 100


def test_ids_outside_of_the_vocabulary_are_named(text_file: Path) -> None:
    with pytest.raises(ValueError, match="made the id 226 of a text, but its vocab_size is 100"):
        open_tokens(text_file, Wrong())
    tokens = open_tokens(text_file)
    path = tokens.paths("val")[0]
    path.write_bytes(bytes([7, 99, 3]) + path.read_bytes()[3:])
    size = tokens.tokenizer.vocab_size
    with pytest.raises(ValueError, match=rf"val-00000\.bin holds .* 99, .* ends at {size - 1}:"):
        tokens.span("val").read(0, 4)


def tokenize_at_once(path: Path, barrier: Barrier) -> None:
    barrier.wait()
    tokens = open_tokens(path)
    assert "".join(text_of(tokens)) == TEXT * 20


@pytest.mark.usefixtures("shards")
def test_processes_that_share_a_folder_may_write_at_once(text_file: Path) -> None:
    text_file.write_bytes((TEXT * 20).encode())
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    processes = [fork.Process(target=tokenize_at_once, args=(text_file, barrier)) for _ in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    names = files_in(text_file.parent / "cache")
    assert not [name for name in names if name.startswith(".")]
    assert "".join(text_of(open_tokens(text_file))) == TEXT * 20


def test_a_complete_cache_may_be_read_only(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_tokens(text_file)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "write_text", "write_bytes", "replace", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    assert "".join(text_of(open_tokens(text_file))) == TEXT


@pytest.mark.usefixtures("shards")
def test_a_folder_of_tokens_is_read_without_its_text(text_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"context": 4, "val_fraction": 0.3, "tokenizer": "char"}
    made = TextDataModule(text_file, cache_dir=str(tmp_path), **options)
    shutil.copytree(made.token_folder, tmp_path / "copy")
    text_file.unlink()
    data = TextDataModule(str(tmp_path / "copy"), **options)
    assert data.tokenizer.to_dict() == made.tokenizer.to_dict()
    for batch, expected in zip(data.train_dataloader(), made.train_dataloader(), strict=True):
        assert torch.equal(batch["input_ids"], expected["input_ids"])
    other = {"context": 4, "val_fraction": 0.2, "test_fraction": 0.1}
    with pytest.raises(ValueError, match=r"was char, is byte; val_fraction was 0.3, is 0.2; test"):
        TextDataModule(tmp_path / "copy", **other).setup()
    alphabet = CharTokenizer("abc")
    with pytest.raises(ValueError, match=r"another one of kind char$"):
        TextDataModule(tmp_path / "copy", **{**options, "tokenizer": alphabet}).setup()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokens.json", b"{", r"tokens\.json is not JSON"),
        ("tokens.json", b'{"format_version": 99}', "has format 99, this version reads 3"),
        ("train-00000.bin", b"abc", r"train-00000\.bin is damaged: it has 3 bytes, not \d+$"),
        ("train-00000.bin", b"a" * 161, "the tokens in .* are damaged"),
    ],
)
def test_a_damaged_folder_of_tokens_is_named(
    text_file: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    folder = open_tokens(text_file, ByteTokenizer()).folder
    if len(content) == 161:
        content = b"a" * (folder / name).stat().st_size
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        TextDataModule(folder, context=4).setup()
    assert "\n" not in str(error.value)


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
    assert files_in(text_file.parent / "cache") == []


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

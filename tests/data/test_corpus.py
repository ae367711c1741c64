import gzip
import os
from pathlib import Path

import pytest

from lightning_dsmoe.data import corpus as corpus_module
from lightning_dsmoe.data.corpus import find_corpus


def test_patterns_are_expanded_sorted_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "other.md"):
        (tmp_path / name).write_text(name)
    found = find_corpus(["~/*.txt", str(tmp_path / "a.txt"), str(tmp_path / "**" / "c.txt")])
    assert [path.name for path in found.files] == ["a.txt", "b.txt", "c.txt"]
    assert found.size == sum(found.sizes) == 5 + 5 + 10
    assert "".join(found.read(0, found.size)) == "a.txtb.txtdeep/c.txt"


def test_a_name_with_glob_signs_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "[a].txt").write_text("brackets")
    assert [path.name for path in find_corpus(str(tmp_path / "[a].txt")).files] == ["[a].txt"]


def test_standard_library_is_the_default() -> None:
    found = find_corpus()
    names = {path.name for path in found.files}
    assert {"argparse.py", "ast.py", "decoder.py"} <= names
    assert found.size > 1_000_000
    assert not {"test", "tests", "idlelib", "site-packages"} & {
        part for path in found.files for part in path.parts[-3:-1]
    }


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_pieces_join_to_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", piece)
    texts = ["ä first\r\nline é\n", "", "no newline at the end 🐈"]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_bytes(text.encode())
    found = find_corpus(str(tmp_path / "*.txt"))
    pieces = list(found.read(0, found.size))
    assert "".join(pieces) == "".join(texts)
    assert len(pieces) == (3 if piece < 10 else 2)


@pytest.mark.parametrize("line", [4, 5, 6, 7])
def test_a_line_without_end_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: int
) -> None:
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", 3)
    monkeypatch.setattr(corpus_module, "LINE_BYTES", line)
    text = "aé🐈b🐈🐈–cd" * 7 + "\nend"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = find_corpus(str(tmp_path / "a.txt"))
    pieces = list(found.read(0, found.size))
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 3 + line
    (tmp_path / "a.txt").write_bytes(b"ab" + b"\x80" * 20)
    with pytest.raises(ValueError, match="invalid UTF-8 at byte offset 2"):
        list(find_corpus(str(tmp_path / "a.txt")).read(0, 22))


def test_boundaries_fall_between_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("xä🐈", encoding="utf-8")  # 1 + 2 + 4 bytes
    (tmp_path / "b.txt").write_text("éy", encoding="utf-8")
    found = find_corpus(str(tmp_path / "*.txt"))
    boundaries = [found.boundary(position) for position in range(found.size + 1)]
    assert boundaries == [0, 1, 1, 3, 3, 3, 3, 7, 7, 9, 10]
    assert "".join(found.read(3, 9)) == "🐈é"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"line\nab\0c", "a.txt is not a text file: NUL byte at offset 7"),
        (b"line\nab\xffc", "a.txt is not a text file: invalid UTF-8 at byte offset 7"),
        ("line\nabä".encode()[:-1], "invalid UTF-8 at byte offset 7"),
    ],
)
def test_binary_file_is_named_with_the_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(content)
    found = find_corpus(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match=message):
        list(found.read(0, found.size))


def test_a_utf_8_mark_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", 4)
    (tmp_path / "a.txt").write_text("xä", encoding="utf-8-sig")  # 1 + 2 bytes after the mark
    (tmp_path / "b.txt").write_text("", encoding="utf-8-sig")
    (tmp_path / "c.txt").write_text("éy\n", encoding="utf-8-sig")
    found = find_corpus(str(tmp_path / "*.txt"))
    assert found.size == 7
    assert "".join(found.read(0, 7)) == "xäéy\n"
    assert "".join(found.read(1, 5)) == "äé"
    assert [found.boundary(position) for position in range(8)] == [0, 1, 1, 3, 3, 5, 6, 7]
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(ValueError, match="byte offset 5"):
        list(find_corpus(str(tmp_path / "c.txt")).read(0, 3))


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
def test_other_encodings_are_named_with_the_way_out(
    tmp_path: Path, encoding: str, order: str
) -> None:
    path = tmp_path / "my text.txt"
    path.write_bytes(("\ufeff" + "text\n").encode(f"{encoding}-{order}"))
    command = f"iconv -f {encoding} -t UTF-8 '{path}'"
    with pytest.raises(ValueError, match=f"{encoding}, only UTF-8 is read.*{command}"):
        find_corpus(path)


def test_compressed_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(ValueError, match=r"a\.txt\.gz is compressed \(gzip\): unpack it first"):
        find_corpus(str(tmp_path / "*"))


def test_paths_name_files_as_texts_do(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    both = find_corpus([str(tmp_path / "a.txt"), tmp_path / "b.txt"])
    assert find_corpus(tmp_path / "*.txt") == both
    assert find_corpus(tmp_path / "a.txt").files == both.files[:1]


def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for files, message in {
        "texts": r"'texts' is a folder: .*, such as 'texts/\*\.txt', or 'texts/\*\*/\*' for all",
        "pipe": r"only folders or devices match 'pipe'",
        "t*": r"only folders or devices match 't\*'",
        "absent.txt": f"there is no file 'absent.txt' in {tmp_path}",
        "/absent/a.txt": "there is no file '/absent/a.txt'$",
        "https://host/a.txt": "address 'https://host/a.txt': download it first",
        "s3://bucket/a.txt": "address 's3://bucket/a.txt': download it first",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_corpus(files)
        with pytest.raises(ValueError, match="download it first" if "://" in files else message):
            find_corpus([Path(files)])


def test_missing_and_empty_corpora_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file matches '.*\*\.nothing'"):
        find_corpus(str(tmp_path / "*.nothing"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"the corpus is empty: 0 bytes .*empty\.txt"):
        find_corpus(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="at least one text file"):
        find_corpus([])

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dsmoe.data import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, Tokenizer
from lightning_dsmoe.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def bpe() -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog on the log"] * 4, trainer)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    return tokenizer.to_str()


@settings(deadline=None)
@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokens = ByteTokenizer().encode(text)
    assert tokens.tolist() == list(text.encode())
    assert ByteTokenizer().decode(tokens.tolist()) == text


@pytest.fixture(params=["byte", "char", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, bpe: str) -> Tokenizer:
    makers = {"char": lambda: CharTokenizer("ab"), "huggingface": lambda: HuggingFaceTokenizer(bpe)}
    return makers.get(request.param, ByteTokenizer)()


def test_unknown_numbers_decode_to_replacement_signs(bpe: str) -> None:
    assert ByteTokenizer().decode([65, 256, 300, 2**40]) == "A\ufffd\ufffd\ufffd"
    assert CharTokenizer("ab").decode([0, 2, 1, 2**40]) == "a\ufffdb\ufffd"
    assert HuggingFaceTokenizer(bpe).decode([0, 300, 2**40]) == HuggingFaceTokenizer(bpe).decode(
        [0]
    )


def test_negative_numbers_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="tokens must be 0 or more, got -1"):
        tokenizer.decode([0, -1])


@pytest.mark.parametrize(
    "tokens", [[0.5], ["a"], [None], [[0]], 3, np.zeros(2), torch.zeros(1, 2, dtype=torch.int64)]
)
def test_what_is_no_sequence_of_integers_is_refused(tokenizer: Tokenizer, tokens: Any) -> None:
    with pytest.raises(TypeError, match="tokens must be a sequence of integers, got"):
        tokenizer.decode(tokens)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, lambda t: np.array(t, np.uint8)])
def test_any_sequence_of_integers_decodes(tokenizer: Tokenizer, make: Callable[..., Any]) -> None:
    tokens = tokenizer.encode("ab").tolist()
    assert tokenizer.decode(make(tokens)) == "ab"


def test_what_is_not_unicode_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"'\\udcff' at position 2"):
        tokenizer.encode("ab\udcff")


def test_bytes_that_are_not_text_decode_to_replacement_signs() -> None:
    assert ByteTokenizer().decode([0xFF, 65]) == "\N{REPLACEMENT CHARACTER}A"


@settings(deadline=None)
@given(st.text(min_size=1), st.data())
def test_characters_round_trip(alphabet: str, data: st.DataObject) -> None:
    tokenizer = CharTokenizer(alphabet)
    text = data.draw(st.text(st.sampled_from(alphabet)))
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text)
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.decode(tokens.tolist()) == text
    copy = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert copy.encode(text).tolist() == tokens.tolist()


def test_alphabet_is_sorted_and_distinct() -> None:
    assert CharTokenizer("banana").alphabet == "abn"
    assert CharTokenizer("banana").fingerprint() == CharTokenizer("nab").fingerprint()
    assert CharTokenizer("banana").fingerprint() != CharTokenizer("ban!").fingerprint()


@pytest.mark.parametrize(("text", "named"), [("abc", "'c' at position 2"), ("!ab", "'!'")])
def test_unknown_character_is_named(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"unknown character {named}"):
        CharTokenizer("ab").encode(text)


def test_hugging_face_json_and_path_agree(bpe: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe)
    text = "the mat and the Ünïcode 🐈\n"
    for tokenizer in (HuggingFaceTokenizer(bpe), load_tokenizer(tmp_path / "tokenizer.json")):
        tokens = tokenizer.encode(text)
        assert 2 < len(tokens) < len(text.encode())  # neither truncated nor padded nor bytes
        assert tokens.max() < tokenizer.vocab_size
        assert tokenizer.decode(tokens.tolist()) == text
        assert Tokenizer.from_dict(tokenizer.to_dict()).encode(text).tolist() == tokens.tolist()


def test_the_end_of_a_text_is_known_by_its_name(bpe: str) -> None:
    made = tokenizers.Tokenizer.from_str(bpe)
    made.add_special_tokens(["<|endoftext|>", "<other>"])
    made.add_tokens(["</s>"])  # which a text may have
    tokenizer = HuggingFaceTokenizer(made.to_str())
    assert tokenizer.ends == [made.token_to_id("<|endoftext|>")]
    assert Tokenizer.from_dict(tokenizer.to_dict()).ends == tokenizer.ends
    assert HuggingFaceTokenizer(bpe).ends == ByteTokenizer().ends == []


@pytest.mark.parametrize(
    ("decoder", "vocabulary", "pieces"),
    [
        (tokenizers.decoders.Metaspace(), ["\u2581the", "re"], [" the", "re"]),
        (tokenizers.decoders.ByteLevel(), ["\u0120the", "re"], [" the", "re"]),
        (tokenizers.decoders.WordPiece(), ["the", "##re"], [" the", "re"]),
    ],
)
def test_pieces_keep_the_blank_before_a_word(
    decoder: tokenizers.decoders.Decoder, vocabulary: list[str], pieces: list[str]
) -> None:
    numbers = {token: number for number, token in enumerate(vocabulary)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="re"))
    made.decoder = decoder
    tokenizer = HuggingFaceTokenizer(made.to_str())
    assert [tokenizer.piece(number) for number in range(2)] == pieces


def test_a_piece_that_joins_another_is_what_it_is_alone() -> None:
    """The end of one letter and the beginning of another, which two of them make a whole one."""
    model = tokenizers.models.WordLevel({"\u00a9\u00c3": 0}, unk_token="\u00a9\u00c3")
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = HuggingFaceTokenizer(made.to_str())
    assert tokenizer.decode([0, 0]) == "\ufffd\u00e9\ufffd"
    assert tokenizer.piece(0) == "\ufffd\ufffd"


def test_pieces_of_bytes_and_characters_are_themselves() -> None:
    assert [ByteTokenizer().piece(byte) for byte in b" a\xc3"] == [" ", "a", "\ufffd"]
    assert [CharTokenizer(" ab").piece(number) for number in range(3)] == [" ", "a", "b"]


@pytest.mark.parametrize("text", ["/dev/zero", "tokenizer.json", "[]", "x" * 100_000])
def test_a_description_opens_no_file(text: str, bpe: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe)
    with contextlib.chdir(tmp_path), pytest.raises(ValueError, match="must be a JSON obj") as error:
        Tokenizer.from_dict({"kind": "huggingface", "json": text})
    assert len(str(error.value)) < 200


def test_vocabulary_with_gaps_counts_to_its_largest_number() -> None:
    model = tokenizers.models.WordLevel({"a": 0, "b": 9}, unk_token="a")
    assert HuggingFaceTokenizer(tokenizers.Tokenizer(model).to_str()).vocab_size == 10


def test_own_description_loads_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "characters.json"
    path.write_text(json.dumps(CharTokenizer("abc").to_dict()))
    assert load_tokenizer(path).to_dict() == {"kind": "char", "alphabet": "abc"}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"kind": "os.system"}, "must be byte, char or huggingface, got 'os.system'"),
        ({}, "got None"),
        ({"kind": "byte", "size": 256}, "must have the fields kind; .* unknown: \\['size'\\]"),
        ({"kind": "char"}, "must have the fields kind, alphabet; missing"),
        ({"kind": "char", "alphabet": ""}, "alphabet must be a string of length 1 to"),
        ({"kind": "char", "alphabet": 7}, "alphabet must be a string of .*, got 7"),
        ({"kind": "huggingface", "json": "{}"}, "not a tokenizers JSON"),
    ],
)
def test_bad_description_is_refused(state: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_dict(state)


@pytest.mark.parametrize("content", [None, "not JSON", "[]", "{}"])
def test_bad_tokenizer_file_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(path)


NO_MARK = {"SpecialToken": {"id": "gone", "type_id": 0}}
TEXT_ALONE = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    ("model", "post_processor", "use", "message"),
    [
        ({"unk_token": "gone"}, None, lambda t: t.encode("z"), "cannot encode this text: .*Unk"),
        (
            {},
            {"type": "TemplateProcessing", "single": [NO_MARK, TEXT_ALONE], "pair": [TEXT_ALONE]}
            | {"special_tokens": {}},
            lambda t: t.beginning,
            "^the tokenizer cannot add its special tokens: no entry found for key$",
        ),
    ],
    ids=["exception", "panic"],
)
def test_what_the_package_raises_later_is_one_line(
    model: dict[str, object],
    post_processor: dict[str, object] | None,
    use: Callable[[Tokenizer], object],
    message: str,
) -> None:
    words = {"type": "BPE", "vocab": {"a": 0}, "merges": [], **model}
    tokenizer = HuggingFaceTokenizer(json.dumps({"model": words, "post_processor": post_processor}))
    with pytest.raises(ValueError, match=message):
        use(tokenizer)


def test_a_pipe_is_no_tokenizer_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"got '{path}': not a file but a device or a pipe"):
            load_tokenizer(path)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, bpe: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-dsmoe\[hf\]'"):
        HuggingFaceTokenizer(bpe)

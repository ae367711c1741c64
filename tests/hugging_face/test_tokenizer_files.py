import json
from pathlib import Path

import pytest

from lightning_dsmoe.hugging_face.tokenizer_files import adds_special_tokens, tokenizer_files
from lightning_dsmoe.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
)

transformers = pytest.importorskip("transformers")

TEXT = "Hé llo\n\n\r\n  wörld  é😀 \t x <s> don't , . \N{NO-BREAK SPACE}\N{SOFT HYPHEN}\x00\x7f"
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<s>": 2}, "unk_token": "a"}


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer(TEXT)])
def test_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    for name, text in tokenizer_files(tokenizer, 64).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT).tolist()
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT
    assert theirs.eos_token_id is None


def test_every_byte() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(tokenizer_files(ByteTokenizer(), 64)["tokenizer.json"])
    for codes in (range(0x800), range(0x4E00, 0x4F00), range(0x1F600, 0x1F640)):
        text = "".join(map(chr, codes))
        assert theirs.encode(text).ids == ByteTokenizer().encode(text).tolist()


def test_what_no_file_can_hold() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer_files(CharTokenizer("a\ud800"), 64)


def test_a_file_stays_as_it_is() -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
    }
    plain = HuggingFaceTokenizer(json.dumps({"model": WORDS}))
    adding = HuggingFaceTokenizer(json.dumps({"model": WORDS, "post_processor": template}))
    assert [adds_special_tokens(each) for each in (plain, adding)] == [False, True]
    assert tokenizer_files(adding, 64)["tokenizer.json"] == adding.to_dict()["json"]

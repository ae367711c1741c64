"""Text in and text out."""

import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.inference import SparseModel, compile_sparse, load_sparse, text
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
)

from .conftest import UNCOMPILED, rotary_glu

LETTERS = CharTokenizer(string.ascii_lowercase + " .\n")
PROMPTS = ["a", "in the end ", "two. "]


@pytest.fixture
def model() -> SparseModel:
    plan = SelectionPlan()
    return compile_sparse(rotary_glu(), plan, switch_points=UNCOMPILED, tokenizer=LETTERS)


@pytest.mark.parametrize(
    ("new", "stop", "expected"),
    [
        ("naïve €uro 🙂!".encode(), [], "naïve €uro 🙂!"),
        (b"one. two", ".", "one."),
        (b"one>\n\ntwo\n\n", "\n\n", "one>\n\n"),
        (b"one two", ["wo", "e t", "one two."], "one t"),
        ("no € more".encode(), ["€"], "no €"),
        (b"cut \xf0\x9f\x99", [], "cut "),
        (b"bad \xff byte", [], "bad \N{REPLACEMENT CHARACTER} byte"),
    ],
)
def test_characters_come_once_and_whole_up_to_a_stop_text(
    new: bytes, stop: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recited(model: object, tokens: Tensor, most: int, **options: Any) -> Iterator[Tensor]:
        return (torch.full((len(tokens),), byte) for byte in new)

    monkeypatch.setattr(text, "new_tokens", recited)
    given = (rotary_glu(), ByteTokenizer())
    pieces = list(text.TextGeneration(*given, ["> ."], 9, stop=stop).pieces())
    assert "".join(pieces) == expected
    assert all(pieces)
    assert len(pieces) > 2
    both = text.TextGeneration(*given, ["> .", "\n\n"], 9, stop=stop).texts()
    assert both == [f"> .{expected}", f"\n\n{expected}"]


def test_texts_continue_as_their_tokens_do(model: SparseModel) -> None:
    assert isinstance(model.tokenizer, Tokenizer)
    together = model.generate(PROMPTS, 12, temperature=0)
    for prompt, continued in zip(PROMPTS, together, strict=True):
        tokens = model.generate(model.tokenizer.encode(prompt), 12, temperature=0)
        assert model.tokenizer.decode(tokens.tolist()) == continued
        assert model.generate(prompt, 12, temperature=0) == continued
        pieces = model.stream(prompt, 12, temperature=0)
        assert prompt + "".join(pieces) == continued
    stop = together[0][3:5]
    stopped = model.generate(PROMPTS, 12, temperature=0, stop=stop)
    for prompt, whole, part in zip(PROMPTS, together, stopped, strict=True):
        at = whole.find(stop, len(prompt))
        assert part == (whole if at < 0 else whole[: at + 2])
    assert len(stopped[0]) < len(together[0])
    seeded = [model.generate("a", 20, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert len(seeded[0]) == 21


def test_a_token_that_ends_texts_ends_one_and_adds_nothing(
    model: SparseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a", "in the end "]
    whole = [model.generate(prompt, 12, temperature=0) for prompt in prompts]
    end = whole[0][4]
    monkeypatch.setattr(CharTokenizer, "ends", property(lambda _: LETTERS.encode(end).tolist()))
    cut = [
        prompt + text.removeprefix(prompt).partition(end)[0]
        for prompt, text in zip(prompts, whole, strict=True)
    ]
    assert len(cut[0]) < len(whole[0])
    assert [model.generate(prompt, 12, temperature=0) for prompt in prompts] == cut
    assert model.generate(prompts, 12, temperature=0) == cut
    assert "a" + "".join(model.stream("a", 12, temperature=0)) == cut[0]


def test_the_beginning_of_a_text_precedes_a_prompt_and_is_not_shown() -> None:
    processors = pytest.importorskip("tokenizers").processors
    plain = HuggingFaceTokenizer(json.dumps(letter_tokens()))
    plain._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 28)]
    )
    marked = HuggingFaceTokenizer(plain.to_dict()["json"])
    assert (marked.beginning, len(marked.encode("ab"))) == ([28], 2)
    model = compile_sparse(
        rotary_glu(), SelectionPlan(), switch_points=UNCOMPILED, tokenizer=marked
    )
    prompts = ["ab", "in the end", "<s>ab"]
    found = model.generate(prompts, 9, temperature=0)
    for prompt, continued in zip(prompts, found, strict=True):
        tokens = [28, *marked.encode(prompt.removeprefix("<s>")).tolist()]
        whole = model.generate(tokens, 9, temperature=0).tolist()
        assert continued == prompt + marked.decode(whole[len(tokens) :])
        assert "".join(model.stream(prompt, 9, temperature=0)) == continued[len(prompt) :]
    assert found[2] == f"<s>{found[0]}"  # once, also where the prompt has it
    without = model.generate(marked.encode("ab"), 9, temperature=0).tolist()
    assert found[0] != marked.decode(without)
    alone = model.generate([28], 9, temperature=0).tolist()
    assert model.generate("", 9, temperature=0) == marked.decode(alone[1:])


def letter_tokens() -> dict[str, Any]:
    """A tokenizer JSON with a token for each letter, joined without blanks, and `<s>`."""
    letters = string.ascii_lowercase + " ."
    special = {"id": 28, "content": "<s>", "special": True, "normalized": False}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {
        "version": "1.0",
        "added_tokens": [special],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "."},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {c: i for i, c in enumerate(letters)} | {"<s>": 28},
            "unk_token": "a",
        },
    }


def test_200_tokens_unless_told(model: SparseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counting(model: object, tokens: Tensor, most: int, **options: Any) -> Iterator[Tensor]:
        counts.append(most)
        return iter(())

    monkeypatch.setattr(text, "new_tokens", counting)
    assert model.generate("a") == "a"
    assert list(model.stream("a")) == []
    assert counts == [200, 200]


@pytest.mark.parametrize("tokenizer", [LETTERS, CharTokenizer(string.printable[:29]), None])
def test_the_lines_of_the_card_run(
    tokenizer: Tokenizer | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plan = SelectionPlan()
    model = compile_sparse(rotary_glu(), plan, switch_points=UNCOMPILED, tokenizer=tokenizer)
    model.save(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    card = Path("README.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    assert "max_new_tokens=100)" in lines
    exec(compile(lines.replace("=100)", "=9)"), "README.md", "exec"), names)
    if tokenizer is None:
        assert names["tokens"].shape == (11,)
    else:
        assert len(capsys.readouterr().out) == 11
    assert ("lightning-dsmoe generate --artifact . --prompt" in card) == (tokenizer is not None)


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda m: m.generate("a", max_length=9), "'max_length'; max_new_tokens"),
        (lambda m: m.generate("a", do_sample=False), "'do_sample'; temperature=0"),
        (lambda m: m.generate([1], eos_token_id=2), "'eos_token_id'; stop="),
        (lambda m: m.generate(input_ids=torch.ones(1, 2)), "'input_ids'; .* first argument"),
        (lambda m: m.generate([1], attention_mask=None), "'attention_mask'; mask="),
        (lambda m: m.stream("a", num_return_sequences=2), "stream has no 'num_return_sequences'"),
        (lambda m: m.generate("a", mask=torch.ones(1, 1)), "'mask'; texts are padded"),
        (
            lambda m: m.generate([1], beams=2),
            "'beams'; its options are context_length, .*top_k, top_p",
        ),
        (lambda m: m.generate(), "needs prompts"),
        (lambda m: m.stream([1, 2]), "one text"),
    ],
)
def test_names_from_elsewhere_get_a_hint(call: Any, hint: str, model: SparseModel) -> None:
    with pytest.raises(TypeError, match=hint):
        call(model)


def test_what_is_no_text(model: SparseModel, tmp_path: Path) -> None:
    for prompts in ("", ["a", ""]):
        with pytest.raises(ValueError, match="a prompt must have a token or more, got ''"):
            model.generate(prompts)
    for stop in ([3], "", ["a", ""]):
        with pytest.raises(ValueError, match="stop must be"):
            model.generate("a", stop=[stop] if stop == "" else stop)
    with pytest.raises(ValueError, match="temperature must be"):  # before the first piece
        model.stream("a", temperature=-1)
    model.tokenizer = None
    with pytest.raises(ValueError, match="without a tokenizer"):
        model.generate("a")
    model.tokenizer = {"kind": "unheard of"}
    model.save(tmp_path / "model")
    loaded = load_sparse(tmp_path / "model")
    assert loaded.generate([1, 2], 3).shape == (5,)
    with pytest.raises(ValueError, match="tokenizer kind must be byte, char or huggingface"):
        loaded.generate("a")


def test_runs_of_bytes_of_a_hugging_face_tokenizer_come_whole() -> None:
    """Its decoder makes replacement signs of a whole run of bytes while the last is incomplete."""
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "fuse_unk": False,
            "vocab": {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "b": 257},
            "merges": [],
        },
    }
    tokenizer = HuggingFaceTokenizer(json.dumps(description))
    growing = text.TextStream(tokenizer, "ab", None)
    pieces = [growing.add(byte) for byte in "世界人".encode() + "語".encode()[:2]]
    assert [piece for piece in pieces if piece] == ["世", "界", "人"]
    assert growing.text == "ab世界人"

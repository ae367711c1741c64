"""Tokenizers of this library as the files that `AutoTokenizer` reads."""

import json
from typing import Any

from lightning_dsmoe.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer


def tokenizer_files(tokenizer: Tokenizer, context_length: int) -> dict[str, str]:
    """Names and contents of the files.

    Args:
        tokenizer: the tokenizer.
        context_length: most tokens that the model attends to.

    Raises:
        ValueError: if the files cannot say what the tokenizer does.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    return {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def adds_special_tokens(tokenizer: Tokenizer) -> bool:
    """Whether the files add tokens of their own to a text, which this library leaves out."""
    state = tokenizer.to_dict()
    return "json" in state and "TemplateProcessing" in json.dumps(
        json.loads(state["json"]).get("post_processor")
    )


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, ByteTokenizer):
        described = _bytes()
    elif isinstance(tokenizer, CharTokenizer):
        described = _characters(tokenizer.alphabet)
    else:
        return tokenizer.to_dict()["json"]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    whole = {"version": "1.0", **empty, "added_tokens": [], **described}
    return json.dumps(whole, ensure_ascii=False) + "\n"


def _bytes() -> dict[str, Any]:
    """Every byte is a token of its own number.

    The package calls bytes by printable characters: those that are printable by themselves, the
    others by the characters from 256 on, in their order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    by_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "pre_tokenizer": by_bytes,
        "decoder": by_bytes,
        "model": {"type": "BPE", "vocab": {names[b]: b for b in range(256)}, "merges": []},
    }


def _characters(alphabet: str) -> dict[str, Any]:
    """Every character is a word; one that is not in the alphabet is an error, as here."""
    try:
        alphabet.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "its alphabet has halves of surrogate pairs, which files of tokenizers cannot hold"
        ) from None
    split = {
        "type": "Split",
        "pattern": {"Regex": r"[\s\S]"},
        "behavior": "Isolated",
        "invert": False,
    }
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    unknown = "<not in the alphabet>"  # longer than a character, so it is in no alphabet
    return {
        "pre_tokenizer": split,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown},
    }

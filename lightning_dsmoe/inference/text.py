"""Text from a model: prompts and continuations as people read them.

Shapes: B prompts.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.generation import as_tokens, left_pad, new_tokens
from lightning_dsmoe.tokenizers import Tokenizer

Stop = str | Sequence[str]


def continue_texts(
    model: Decoder | Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    stop: Stop = (),
    **options: Any,
) -> list[str]:
    """Continue prompts of any lengths, each up to and with the first stop text in what is new.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: texts of a token or more.
        max_new_tokens: tokens to add at the most.
        stop: a text that ends a continuation, or several.
        options: those of `lightning_dsmoe.inference.generate`, but for the mask.

    Returns:
        Prompts and continuations.

    Raises:
        ValueError: if a prompt is empty or longer than the context, or an option is out of range.
    """
    texts = [_GrowingText(tokenizer, prompt, stop) for prompt in prompts]
    columns: list[Tensor] = []
    for chosen_B in _new_tokens(model, texts, max_new_tokens, options):
        columns.append(chosen_B)
        if not stop:
            continue  # tokens are not waited for before the last one
        for text, token in zip(texts, columns.pop().tolist(), strict=True):
            text.add([token])
        if all(text.ended for text in texts):
            break
    if columns:
        for text, tokens in zip(texts, torch.stack(columns, dim=1).tolist(), strict=True):
            text.add(tokens)
    return [text.text for text in texts]


def stream_text(
    model: Decoder | Engine,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    stop: Stop = (),
    **options: Any,
) -> Iterator[str]:
    """What `continue_texts` adds to one prompt, in pieces, as it comes."""
    text = _GrowingText(tokenizer, prompt, stop)
    return _pieces(text, _new_tokens(model, [text], max_new_tokens, options))


def _pieces(text: "_GrowingText", columns: Iterator[Tensor]) -> Iterator[str]:
    for chosen_B in columns:
        if piece := text.add(chosen_B.tolist()):
            yield piece
        if text.ended:
            return


def example_prompt(description: dict[str, Any] | None) -> str | None:
    """A prompt that a described tokenizer can read; None if there is no such tokenizer here."""
    if description is None:
        return None
    with suppress(ValueError, ImportError):
        tokenizer = Tokenizer.from_dict(description)
        for prompt in ("Once", tokenizer.decode([tokenizer.vocab_size // 2])):
            with suppress(ValueError):
                if len(tokenizer.encode(prompt)):
                    return prompt
    return None


class _GrowingText:
    """A text as its tokens arrive, without characters at its end that are not complete yet."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, stop: Stop) -> None:
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(each, str) and each for each in self._stop):
            raise ValueError(f"stop must be one text or several for prompts of text, got {stop!r}")
        self.tokens = [int(token) for token in tokenizer.encode(prompt)]
        if not self.tokens:
            raise ValueError(f"a prompt must have a token or more, got {prompt!r}")
        self.text = self._decoded()
        self._prompt_length = len(self.text)
        self.ended = False

    def add(self, tokens: list[int]) -> str:
        """Add tokens and give what they add to the text; nothing after a stop text."""
        if self.ended:
            return ""
        self.tokens += tokens
        text = self._decoded()
        found = ((text.find(stop, self._prompt_length), len(stop)) for stop in self._stop)
        ends = [at + length for at, length in found if at >= 0]
        self.ended = bool(ends)
        piece = text[len(self.text) : min(ends, default=None)]
        self.text += piece
        return piece

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.tokens).rstrip("\N{REPLACEMENT CHARACTER}")


def _new_tokens(
    model: Decoder | Engine, texts: list[_GrowingText], max_new_tokens: int, options: dict[str, Any]
) -> Iterator[Tensor]:
    tokens, mask = left_pad([text.tokens for text in texts])
    tokens = as_tokens(model, tokens)
    padding = None if bool(mask.all()) else mask.to(tokens.device)
    return new_tokens(model, tokens, max_new_tokens, mask=padding, **options)

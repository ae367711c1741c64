"""Continuing text: tokens become characters as soon as these are complete.

Shapes: B prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.generation import (
    Tokens,
    as_tokens,
    generate,
    left_pad,
    new_tokens,
)
from lightning_dsmoe.inference.prompts import check_names
from lightning_dsmoe.tokenizers import Tokenizer

Texts = list[str] | tuple[str, ...]
Prompts = str | Texts | Tokens
Stop = str | Sequence[str]
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Most bytes of a character in UTF-8, and thus most tokens."""


class TextGeneration:
    """Continues prompts of any lengths, each up to and with the first stop text in what is new.

    A special token that ends texts (`Tokenizer.ends`) ends one as well, without a text of its own.

    The special tokens with which the tokenizer begins a text precede a prompt that has none; they
    are no part of the texts. Options are checked now, and tokens are computed as `texts` or
    `pieces` need them.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: texts of a token or more, special ones included.
        max_new_tokens: most tokens to add.
        stop: a text that ends a continuation, or several.
        options: those of `lightning_dsmoe.inference.generate`, but for the mask.

    Raises:
        ValueError: if a prompt is empty or longer than the context, or an option is out of range.
    """

    def __init__(
        self,
        model: Decoder | Engine,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        max_new_tokens: int,
        *,
        stop: Stop | None = None,
        **options: Any,
    ) -> None:
        self._texts = [TextStream(tokenizer, prompt, stop) for prompt in prompts]
        tokens, mask = left_pad([text.tokens for text in self._texts])
        tokens = as_tokens(model, tokens)
        padding = None if bool(mask.all()) else mask.to(tokens.device)
        self._columns = new_tokens(model, tokens, max_new_tokens, mask=padding, **options)
        self._can_stop = bool(stop) or bool(tokenizer.ends)

    def texts(self) -> list[str]:
        """Prompts and continuations."""
        # Reading a token's number waits for the device. Only what may end early needs it at once.
        for new_B in self._columns if self._can_stop else list(self._columns):
            for text, token in zip(self._texts, new_B.tolist(), strict=True):
                text.add(token)
            if all(text.ended for text in self._texts):
                break
        return [text.text for text in self._texts]

    def pieces(self) -> Iterator[str]:
        """What is added to the only prompt, piece by piece."""
        [text] = self._texts
        for new_1 in self._columns:
            if piece := text.add(int(new_1)):
                yield piece
            if text.ended:
                return


def continue_texts(
    call: str,
    model: Decoder | Engine,
    tokenizer: Tokenizer | None,
    texts: Texts,
    max_new_tokens: int,
    options: dict[str, Any],
) -> TextGeneration:
    """Continue texts under the options of a user's call, which is named in errors.

    Raises:
        ValueError: if there is no tokenizer, and as `TextGeneration`.
        TypeError: if there is no such option.
    """
    check_names(call, options, of_text=True)
    if tokenizer is None:
        raise ValueError(
            "this model was saved without a tokenizer, so it continues tokens and not text"
        )
    return TextGeneration(model, tokenizer, texts, max_new_tokens, **options)


def continue_prompts(
    model: Decoder | Engine,
    tokenizer: Callable[[], Tokenizer | None],
    prompts: Prompts | None,
    max_new_tokens: int,
    options: dict[str, Any],
) -> str | list[str] | Tensor:
    """Continue prompts as `SparseModel.generate` does: text gives text, and tokens give tokens.

    Args:
        model: the model, in evaluation mode.
        tokenizer: gives its tokenizer, where there is a text.
        prompts: a text, texts, or tokens.
        max_new_tokens: most tokens to add.
        options: the others of the call.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    if isinstance(texts, list | tuple) and texts and all(isinstance(t, str) for t in texts):
        generation = continue_texts(
            "generate", model, tokenizer(), cast(Texts, texts), max_new_tokens, options
        )
        continued = generation.texts()
        return continued[0] if isinstance(prompts, str) else continued
    check_names("generate", options, of_text=False)
    if prompts is None:
        raise TypeError("generate needs prompts: a text, texts or tokens")
    return generate(model, cast(Tokens, prompts), max_new_tokens, **options)


def example_prompt(description: dict[str, Any] | None) -> str | None:
    """A prompt that a described tokenizer can encode; None if it is not available here."""
    if description is None:
        return None
    with suppress(ValueError, ImportError):
        tokenizer = Tokenizer.from_dict(description)
        for prompt in ("Once", tokenizer.decode([tokenizer.vocab_size // 2])):
            with suppress(ValueError):
                if len(tokenizer.encode(prompt)):
                    return prompt
    return None


class TextStream:
    """A text whose tokens arrive one by one, without a last character that is incomplete.

    Args:
        tokenizer: the tokenizer.
        prompt: how it begins.
        stop: a text that ends it, or several.

    Raises:
        ValueError: if the prompt has no token, or a stop text no character.

    Examples:
        >>> from lightning_dsmoe.inference.text import TextStream
        >>> from lightning_dsmoe.tokenizers import ByteTokenizer
        >>> stream = TextStream(ByteTokenizer(), "a", None)
        >>> [stream.add(byte) for byte in "bé".encode()]
        ['b', '', 'é']
        >>> stream.added
        'bé'
    """

    ended: bool
    """Whether a stop text or a token that ends texts was met."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, stop: Stop | None) -> None:
        self._tokenizer = tokenizer
        stops = (stop,) if isinstance(stop, str) else stop or ()
        if not isinstance(stops, Sequence) or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop must be one text or several for prompts of text, got {stop!r}")
        self._stop = tuple(stops)
        self._ends = frozenset(tokenizer.ends)
        tokens, marks = list(map(int, tokenizer.encode(prompt))), tokenizer.beginning
        marked = tokens[: len(marks)] == marks  # by the prompt itself
        self.tokens = tokens if marked else [*marks, *tokens]
        if not self.tokens:
            raise ValueError(f"a prompt must have a token or more, got {prompt!r}")
        self.text = tokenizer.decode(tokens)
        self._prompt_length = len(self.text)
        self._overlap, self._decoded = len(self.tokens) - len(tokens), len(self.tokens)
        self.ended = False

    @property
    def added(self) -> str:
        """The text after the prompt."""
        return self.text[self._prompt_length :]

    def add(self, token: int) -> str:
        """Add a token and return what it adds to the text; nothing at its end and after it."""
        if self.ended:
            return ""
        self.tokens.append(token)
        if token in self._ends:
            self.ended = True
            return ""
        piece = self._next_piece()
        before = len(self.text)
        self.text += piece
        for stop in self._stop:  # each shortens the text, so that the first one to end wins
            at = self.text.find(stop, max(self._prompt_length, before - len(stop) + 1))
            if at >= 0:
                self.ended = True
                self.text = self.text[: at + len(stop)]
        return self.text[before:]

    def _next_piece(self) -> str:
        """The text of the tokens that are not decoded yet.

        They are decoded together with the piece before them. All tokens at every step would cost
        the square of their number, and the new ones alone would lose their blank: many tokenizers
        have none at the beginning of a text.
        """
        overlap = self._tokenizer.decode(self.tokens[self._overlap : self._decoded])
        text = self._tokenizer.decode(self.tokens[self._overlap :])
        may_continue = len(self.tokens) - self._decoded < _LONGEST_CHARACTER
        if text.endswith(_REPLACEMENT) and may_continue:
            return ""  # the bytes at the end may begin a character
        self._overlap, self._decoded = self._decoded, len(self.tokens)
        return text[len(overlap) :]

"""Tokenizers: text to token ids and back, saved as plain JSON."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from pathlib import Path
from reprlib import repr as short_repr
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from lightning_dsmoe.reading import Bounds, check_json, shown

MAX_JSON_CHARACTERS = 256 * 1024**2
_Text = Annotated[str, Bounds(1, MAX_JSON_CHARACTERS)]
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A tokenizer JSON does not say which of its special tokens ends a text. These are the ends of base
# models: GPT-2 and its like, Llama 3 and Granite, Llama 2 and Mistral, Gemma.
_ENDS = {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"}


class Tokenizer(ABC):
    """Turns text into token ids and back.

    Examples:
        >>> from lightning_dsmoe.tokenizers import CharTokenizer, Tokenizer
        >>> saved = CharTokenizer("hello").to_dict()
        >>> saved
        {'kind': 'char', 'alphabet': 'ehlo'}
        >>> Tokenizer.from_dict(saved).vocab_size
        4
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the token ids `[T]` of a text."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids.

        Ids beyond the vocabulary become replacement characters; Hugging Face leaves them out.

        Raises:
            TypeError: If `tokens` is not a sequence of integers.
            ValueError: If one of them is negative.
        """

    @property
    def beginning(self) -> list[int]:
        """Special tokens that belong before a text, which `encode` does not add; often none."""
        return []

    @property
    def ends(self) -> list[int]:
        """Special tokens that end a text, known by their usual names; often none."""
        return []

    def piece(self, token: int) -> str:
        """Return what a token adds to a text, with its leading space if it has one."""
        alone, twice = self.decode([token]), self.decode([token, token])
        return twice.removeprefix(alone) if twice.startswith(alone) else alone

    @abstractmethod
    def to_dict(self) -> dict[str, str]:
        """Return a JSON-able description that `from_dict` reads."""

    @staticmethod
    def from_dict(state: Mapping[str, object]) -> "Tokenizer":
        """Build the tokenizer that `to_dict` described.

        Args:
            state: What `to_dict` returned; it may come from an untrusted file.

        Raises:
            ValueError: On an unknown kind, unknown or missing keys, or wrong values.
        """
        kind = state.get("kind")
        if kind not in ("byte", "char", "huggingface"):
            raise ValueError(f"tokenizer kind must be byte, char or huggingface, got {shown(kind)}")
        text = {"byte": {}, "char": {"alphabet": _Text}, "huggingface": {"json": _Text}}[kind]
        known: dict[str, str] = check_json(f"{kind} tokenizer", dict(state), {"kind": str, **text})
        if kind == "byte":
            return ByteTokenizer()
        if kind == "char":
            return CharTokenizer(known["alphabet"])
        if not _is_object(known["json"]):  # which would be taken for a path
            raise ValueError(
                f"tokenizer json must be a JSON object, got {short_repr(known['json'])}"
            )
        return HuggingFaceTokenizer(known["json"])

    def fingerprint(self) -> str:
        """Return a hash that two tokenizers share only if they encode alike."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8: no vocabulary to learn, no unknown tokens.

    Examples:
        >>> from lightning_dsmoe.tokenizers import ByteTokenizer
        >>> ByteTokenizer().encode("é!").tolist()
        [195, 169, 33]
    """

    @property
    def vocab_size(self) -> int:
        return 256

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.frombuffer(_utf_8(text), dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        known = (min(token, 0xFF) for token in _numbers(tokens))  # 0xFF is in no text
        return bytes(known).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, str]:
        return {"kind": "byte"}


class CharTokenizer(Tokenizer):
    """One token for each distinct character, in code point order.

    Args:
        alphabet: The characters; order and repetition do not matter.

    Raises:
        ValueError: If `alphabet` is empty.

    Examples:
        >>> from lightning_dsmoe.tokenizers import CharTokenizer
        >>> tokenizer = CharTokenizer("hello")
        >>> tokenizer.encode("hole").tolist()
        [1, 3, 2, 0]
        >>> tokenizer.decode([1, 3, 2, 0])
        'hole'
    """

    def __init__(self, alphabet: str) -> None:
        if not alphabet:
            raise ValueError("alphabet must hold at least one character, got ''")
        self.alphabet = "".join(sorted(set(alphabet)))
        self._codes = _code_points(self.alphabet)

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> NDArray[np.int64]:
        codes = _code_points(text)
        tokens = np.searchsorted(self._codes, codes).clip(max=self.vocab_size - 1)
        unknown = self._codes[tokens] != codes
        if unknown.any():
            position = int(unknown.argmax())
            raise ValueError(
                f"unknown character {text[position]!r} at position {position}: "
                f"not one of the {self.vocab_size} characters of the alphabet"
            )
        return tokens.astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        known = len(self.alphabet)
        return "".join(self.alphabet[t] if t < known else _REPLACEMENT for t in _numbers(tokens))

    def to_dict(self) -> dict[str, str]:
        return {"kind": "char", "alphabet": self.alphabet}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face `tokenizers` package (the `hf` extra).

    No special tokens are added, and truncation and padding settings are ignored.

    Args:
        source: Path of a tokenizer JSON file, or its text.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If `source` is not a readable tokenizer JSON.

    Examples:
        >>> from lightning_dsmoe.tokenizers import HuggingFaceTokenizer
        >>> words = '{"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}'
        >>> tokenizer = HuggingFaceTokenizer(f'{{"model": {words}}}')  # doctest: +SKIP
        >>> tokenizer.vocab_size  # doctest: +SKIP
        2
    """

    def __init__(self, source: str | Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "a Hugging Face tokenizer needs: pip install 'lightning-dsmoe[hf]'"
            ) from error
        text = str(source)
        if not _is_object(text):
            text = _read_json(Path(text))
        with _of_the_package("not a tokenizers JSON"):
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not numbers:
            raise ValueError("the tokenizer JSON has an empty vocabulary")
        self._vocab_size = max(numbers) + 1

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode(self, text: str) -> NDArray[np.int64]:
        try:
            with _of_the_package("the tokenizer cannot encode this text"):
                encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            _utf_8(text)  # says why it is no text for the package
            raise
        return np.array(encoding.ids, dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        numbers = [token for token in _numbers(tokens) if token < self._vocab_size]
        with _of_the_package("the tokenizer cannot decode these tokens"):
            return str(self._tokenizer.decode(numbers, skip_special_tokens=False))

    @property
    def beginning(self) -> list[int]:
        with _of_the_package("the tokenizer cannot add its special tokens"):
            marked, plain = (
                list(self._tokenizer.encode("a", add_special_tokens=special).ids)
                for special in (True, False)
            )
        return tokens_before(marked, plain)

    @property
    def ends(self) -> list[int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return [token for token, each in added if each.special and each.content in _ENDS]

    def to_dict(self) -> dict[str, str]:
        return {"kind": "huggingface", "json": self._tokenizer.to_str()}


@contextmanager
def _of_the_package(fault: str) -> Iterator[None]:
    """Let what `tokenizers` raises be a ValueError: bare exceptions, and panics, which are none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, TypeError):
        raise
    except BaseException as error:
        raise ValueError(f"{fault}: {' '.join(str(error).split()):.200}") from error


def tokens_before(marked: Sequence[int], plain: Sequence[int]) -> list[int]:
    """What precedes a text's tokens once special ones are added.

    Args:
        marked: the tokens of any text with special ones around them.
        plain: the tokens of the text alone.

    Examples:
        >>> tokens_before([1, 7, 8, 2], [7, 8])
        [1]
    """
    n = len(plain)
    starts = (i for i in range(len(marked)) if n and list(marked[i : i + n]) == list(plain))
    return list(marked[: next(starts, 0)])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from a Hugging Face tokenizer JSON, or from one that `to_dict` wrote.

    Args:
        path: The JSON file; `~` is expanded.

    Raises:
        ValueError: If the file is missing or not such a JSON.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from lightning_dsmoe.tokenizers import ByteTokenizer, load_tokenizer
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tokenizer.json"
        >>> _ = path.write_text(json.dumps(ByteTokenizer().to_dict()))
        >>> load_tokenizer(path).vocab_size
        256
    """
    text = _read_json(Path(path).expanduser())
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(state).__name__}")
    return Tokenizer.from_dict(state) if "kind" in state else HuggingFaceTokenizer(text)


def _read_json(path: Path) -> str:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("not a file but a device or a pipe")  # which might be read for ever
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f'tokenizer must be "byte", "char" or the path of a tokenizer JSON, got {str(path)!r}: '
            f"{getattr(error, 'strerror', None) or error}"
        ) from error


def _is_object(text: str) -> bool:
    return text.lstrip().startswith("{")


def _utf_8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must be valid Unicode, got {text[error.start]!r} at position {error.start}: a "
            "byte that is not UTF-8, or half of a surrogate pair"
        ) from None


def _numbers(tokens: Sequence[int]) -> list[int]:
    """Token ids as plain integers; a negative one would index a vocabulary from its end."""
    try:
        numbers = list(map(index, tokens))
    except TypeError:
        raise TypeError(
            f"tokens must be a sequence of integers, got {short_repr(tokens)}"
        ) from None
    if (least := min(numbers, default=0)) < 0:
        raise ValueError(f"tokens must be 0 or more, got {least}")
    return numbers


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")

"""Text from anywhere, made fit for HTML."""

import html
import unicodedata

_SYMBOLS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_DOTTED_CIRCLE = "\N{DOTTED CIRCLE}"


def escaped(text: str) -> str:
    """HTML of a text, fit for an attribute too; what cannot be printed is shown as its code."""
    return html.escape("".join(c if c.isprintable() else _code(c) for c in text))


def visible(token: str, number: int) -> str:
    """What to show of a token, not yet HTML: blanks as symbols, no text of its own as its number.

    Args:
        token: its text.
        number: its number.
    """
    if not token or _REPLACEMENT in token:
        return f"#{number}"
    shown = "".join(_SYMBOLS.get(c, c if c.isprintable() else _code(c)) for c in token)
    return _DOTTED_CIRCLE + shown if unicodedata.combining(shown[0]) else shown


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")

"""A text of any length in windows that a model can read.

Shapes: T tokens of a window, S of them that are scored.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens to read, and the ones to score.

    Args:
        inputs: the tokens that the model reads, T of them.
        targets: the last S tokens that it predicts; the last one follows the inputs.

    Examples:
        >>> Window.of(context=[5, 6], continuation=[7, 8], length=3)
        Window(inputs=[5, 6, 7], targets=[7, 8])
        >>> Window.of(context=[5, 6], continuation=[7, 8], length=2)  # the beginning is left out
        Window(inputs=[6, 7], targets=[7, 8])
    """

    inputs: list[int]
    targets: list[int]

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], length: int) -> "Window":
        """A continuation after as much of its context as fits.

        Args:
            context: one token or more.
            continuation: the tokens to score, one or more.
            length: most tokens that the model reads.

        Raises:
            ValueError: if the context is empty, or the continuation alone is too long.
        """
        if not context or not 1 <= len(continuation) <= length:
            raise ValueError(
                f"a context of {len(context)} tokens and a continuation of {len(continuation)}: "
                f"each must have a token or more, and the continuation at most {length}"
            )
        tokens = [*context, *continuation][-(length + 1) :]
        return cls(tokens[:-1], list(continuation))


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[Window]:
    """Windows of a text that score each of its tokens once, the first one after a prefix.

    A window is as long as the model reads. The last one is so too, although it only scores what is
    left: its first tokens were scored before and are its context.

    Args:
        tokens: the text.
        prefix: the token before it.
        length: most tokens that the model reads.

    Examples:
        >>> for window in rolling_windows([1, 2, 3, 4, 5], prefix=0, length=3):
        ...     print(window)
        Window(inputs=[0, 1, 2], targets=[1, 2, 3])
        Window(inputs=[2, 3, 4], targets=[4, 5])
    """
    read = [prefix, *tokens]
    for start in range(0, len(tokens), length):
        targets = list(tokens[start : start + length])
        end = start + len(targets)
        yield Window(read[max(0, end - length) : end], targets)

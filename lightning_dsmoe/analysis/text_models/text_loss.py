"""The loss of a text model on one text, in bits per byte.

Shapes: none; sums over the windows of a text.
"""

import math
from typing import NamedTuple

from lightning_dsmoe.analysis.text_models.scorer import Scorer
from lightning_dsmoe.analysis.text_models.windows import rolling_windows

MOST_AT_ONCE = 2048
"""Most tokens of a text that are read at once, unless a context is given."""


class TextLoss(NamedTuple):
    """The loss on a text.

    Args:
        nats: sum of -ln p over its tokens.
        n_tokens: its tokens.
        n_bytes: its bytes in UTF-8.
        stderr: standard error of `nats`, from how much its windows differ; None of one window.

    Examples:
        >>> loss = TextLoss(nats=70.0, n_tokens=50, n_bytes=100, stderr=None)
        >>> f"{loss.nats_per_token:.2f} nats per token, {loss.bits_per_byte:.2f} bits per byte"
        '1.40 nats per token, 1.01 bits per byte'
    """

    nats: float
    n_tokens: int
    n_bytes: int
    stderr: float | None

    @property
    def nats_per_token(self) -> float:
        """Cross entropy; it compares models of one tokenizer."""
        return self.nats / self.n_tokens

    @property
    def bits_per_byte(self) -> float:
        """The loss whatever the tokenizer."""
        return self.nats / self.n_bytes / math.log(2)


def text_loss(scorer: Scorer, text: str, *, context: int | None = None) -> TextLoss:
    """The loss of a model under a plan on a text, each token of which counts once.

    Args:
        scorer: the model and the plan.
        text: the text.
        context: most tokens of it that the model reads at once; None takes its context length, but
            no more than 2,048: the logits of long contexts do not fit into memory.

    Raises:
        ValueError: if the text is empty, or the context is less than 1 or more than the model's.
        FloatingPointError: if the loss is not a finite number.
    """
    model = scorer.model
    length = min(model.context_length, MOST_AT_ONCE) if context is None else context
    if not 1 <= length <= model.context_length:
        raise ValueError(f"context must be from 1 to {model.context_length}, got {length}")
    tokens = model.encode(text)
    if not tokens:
        raise ValueError("there is no token in the text to measure a loss on")
    windows = list(rolling_windows(tokens, model.prefix_token, length))
    losses = [-score.logprob for score in scorer.scores(windows)]
    nats = math.fsum(losses)
    if not math.isfinite(nats):
        raise FloatingPointError(f"the loss is {nats}")
    # Of a ratio of sums, since the last window is shorter.
    mean = nats / len(tokens)
    squares = [(x - mean * len(w.targets)) ** 2 for x, w in zip(losses, windows, strict=True)]
    n = len(windows)
    stderr = math.sqrt(math.fsum(squares) * n / (n - 1)) if n > 1 else None
    return TextLoss(nats, len(tokens), len(text.encode()), stderr)

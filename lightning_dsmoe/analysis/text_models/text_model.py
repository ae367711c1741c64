"""A causal language model with its tokenizer, as text is scored and continued with it.

Shapes: B sequences in a batch, T positions, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.metrics import ParameterCounts
from lightning_dsmoe.metrics.active_parameters import Masks
from lightning_dsmoe.routing import SelectionPlan

DEFAULT_CONTEXT = 2048
"""Context length in tokens of a model that has none of its own."""


class Read(NamedTuple):
    """What came of reading tokens.

    Args:
        logits_BTV: logits of the token after each token.
        active: the experts that ran, for each routed layer bool `[B, T, E]`, by name.
    """

    logits_BTV: Tensor
    active: Masks


class Continuing(NamedTuple):
    """How prompts are continued.

    Args:
        max_new_tokens: most tokens to add.
        stop: texts that end a continuation; they are not part of it.
        temperature: divides the logits; 0 takes the most probable token (greedy).
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0

    def ended(self, text: str) -> bool:
        """Whether a stop text is in a continuation."""
        return any(stop in text for stop in self.stop)

    def cut(self, text: str) -> str:
        r"""A continuation up to the first stop text in it.

        Examples:
            >>> Continuing(9, stop=("\n", "Q:")).cut("four Q: five")
            'four '
        """
        return text[: min((text.find(stop) for stop in self.stop if stop in text), default=None)]


class TextModel(ABC):
    """A causal language model with its tokenizer, which reads tokens under any plan."""

    counts: ParameterCounts | None
    """Parameters of the model; None if its experts are not known to this library."""
    context_length: int
    """Most tokens that it attends to."""
    vocab_size: int
    """Number of logits of a token."""
    beginning: list[int]
    """Special tokens that the tokenizer puts before a text, such as the one of its beginning."""
    prefix_token: int
    """The token before a text whose first token is scored, too."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model is."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""

    @abstractmethod
    def read(self, tokens_BT: Tensor, plan: SelectionPlan) -> Read:
        """Logits after each token under a plan. Padding belongs to the right, where nobody attends.

        Raises:
            ValueError: if the plan does not fit the model.
        """

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], plan: SelectionPlan, how: Continuing
    ) -> list[str]:
        """Continue prompts of any lengths, each of a token or more.

        Returns:
            The continuations alone, without stop texts.
        """

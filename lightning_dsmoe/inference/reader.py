"""Sequences as far as a model has read them.

Shapes: B batch, T new tokens, V vocabulary.
"""

from typing import Protocol

from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.routing import SelectionPlan


class Reader(Protocol):
    """Sequences as far as a model has read them."""

    @property
    def length(self) -> int:
        """Tokens read, padding included."""
        ...

    def read(self, tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Read new tokens and give the logits `[B, V]` of the one after them.

        Args:
            tokens_BT: new tokens.
            mask_BT: false for padding, on the left of what is read first; None for no padding.
        """
        ...


class DecoderReader:
    """A reader of a plain decoder.

    Args:
        decoder: the decoder.
        batch_size: sequences B.
        capacity: tokens per sequence.
        plan: the experts that run.
    """

    def __init__(
        self, decoder: Decoder, batch_size: int, capacity: int, plan: SelectionPlan
    ) -> None:
        self._decoder = decoder
        self._caches = decoder.new_caches(batch_size, capacity)
        self._plan = plan

    @property
    def length(self) -> int:
        """Tokens read, padding included."""
        return self._caches[0].length

    def read(self, tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Logits `[B, V]` of the token after new ones."""
        logits: Tensor = self._decoder(
            tokens_BT, self._plan, mask=mask_BT, caches=self._caches
        ).logits
        return logits[:, -1]

"""Reading sequences with a cache: what generation needs of a model.

Shapes: B sequences in a batch, T new positions of a sequence, V vocabulary.
"""

from typing import Protocol

from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.routing import SelectionPlan


class Reader(Protocol):
    """A batch of sequences and the keys and values of what a model has read of them."""

    @property
    def length(self) -> int:
        """Tokens read, padding included."""
        ...

    def read(self, tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Read new tokens.

        Args:
            tokens_BT: new tokens.
            mask_BT: false for padding, on the left of what is read first; None for no padding.

        Returns:
            The logits `[B, V]` of the token after them.
        """
        ...


class DecoderReader:
    """Reads with a plain decoder, without an engine.

    Args:
        decoder: the decoder.
        batch_size: number of sequences B.
        capacity: most tokens of a sequence.
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

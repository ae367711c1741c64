"""Routings of a batch, recorded from one hook to another."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_dsmoe.routing import RoutingRecord, record_routings
from lightning_dsmoe.routing.routing import Kind

Tokens = tuple[Kind, Tensor, Tensor | None]
"""Of a router: its kind, its probabilities `[..., E]`, detached, and which tokens count."""


class OpenRecord:
    """A record that one hook opens and another closes; it keeps nothing alive between batches."""

    def __init__(self) -> None:
        self._scope = ExitStack()
        self._record: RoutingRecord | None = None

    @property
    def is_open(self) -> bool:
        """Whether it records."""
        return self._record is not None

    def open(self, pl_module: LightningModule) -> None:
        """Record from here on; a batch that was skipped did not close its own."""
        self.close()
        self._record = self._scope.enter_context(record_routings(pl_module))

    def close(self, outputs: Any = None) -> dict[str, Tokens]:
        """Stop recording.

        Args:
            outputs: what the step returned; the "mask" of a dict has the tokens that count.

        Returns:
            The tokens of each layer that was called, by name; none if nothing was open.
        """
        self._scope.close()
        record, self._record = self._record, None
        if record is None:
            return {}
        mask = token_mask(outputs)
        return {
            name: (record.layers[name].kind, said.probs.detach(), record.mask_of(name, mask))
            for name, said in record.routings.items()
        }


def token_mask(outputs: Any) -> Tensor | None:
    """The tokens that count, the bool "mask" in the dict that a step returned; None for all."""
    mask = outputs.get("mask") if isinstance(outputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None

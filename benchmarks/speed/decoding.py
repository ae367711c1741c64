"""Sequences that a model goes on with, one token of each at a time.

Shapes: B sequences, T tokens.
"""

from typing import Protocol

import torch
from torch import Tensor

from benchmarks.timing import seconds_per_call
from lightning_dsmoe import SelectionPlan
from lightning_dsmoe.inference import SparseModel


class Reader(Protocol):
    """Reads sequences, first their prompts `[B, T]`, then token by token `[B, 1]`."""

    def start(self, prompt_BT: Tensor) -> None: ...

    def step(self, tokens_B1: Tensor) -> Tensor: ...


class Ours:
    """Reads with the engine of this library.

    Args:
        model: the model.
        plan: the experts that run.
        capacity: most tokens of a sequence.
    """

    def __init__(self, model: SparseModel, plan: SelectionPlan, capacity: int) -> None:
        self._model, self._plan, self._capacity = model, plan, capacity

    def start(self, prompt_BT: Tensor) -> None:
        """Forget everything and read prompts."""
        self._model.warm_up(len(prompt_BT), self._plan)
        self._context = self._model.engine.open(len(prompt_BT), self._capacity, self._plan)
        self._context.read(prompt_BT)

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Read one token more of each sequence and give the most probable one after it, `[B]`."""
        return self._context.read(tokens_B1).argmax(-1)


class Decoding:
    """Sequences of random text, from their prompts again when they are full.

    Each step reads the next token of the text, not the one that the model finds most probable:
    random models soon repeat one token, whose experts would stay in the processor's cache.

    Args:
        reader: the reader.
        text_BT: the text, as long as sequences may become.
        prompt: tokens of it that are read at once.
    """

    def __init__(self, reader: Reader, text_BT: Tensor, prompt: int) -> None:
        self._reader = reader
        self._text_BT = text_BT
        self._prompt = prompt
        self._tokens_TB1 = [tokens_B1.clone() for tokens_B1 in text_BT.split(1, dim=1)]
        self._length = len(self._tokens_TB1)

    @torch.inference_mode()
    def turn(self, steps: int) -> float:
        """Seconds per step of a few in a row, after one that does not count."""
        if self._length + 1 + steps > len(self._tokens_TB1):
            self._reader.start(self._text_BT[:, : self._prompt])
            self._length = self._prompt
        self._step()
        return seconds_per_call(self._step, steps)

    def _step(self) -> None:
        self._reader.step(self._tokens_TB1[self._length])
        self._length += 1

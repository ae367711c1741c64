"""Timing a Lightning fit and a plain loop, alternating, inside the fit."""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.plain_gpt import PlainGPT, adamw, training_step, windows
from lightning_dsmoe import TextDataModule
from lightning_dsmoe.data.windows import TrainingWindows


class TakeTurns(Callback):
    """Times blocks of training steps, and in between as many steps of a plain loop.

    The plain loop trains a `PlainGPT` of the quickstart's size on the same text.

    Args:
        steps: steps in a block.
        skip: steps before the first block.
    """

    def __init__(self, *, steps: int, skip: int) -> None:
        self.steps = steps
        self.skip = skip
        self.plain_step: Callable[[], None] = lambda: None
        self.own_seconds: list[float] = []
        self.plain_seconds: list[float] = []
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.plain_step = plain_step(trainer.datamodule, trainer.train_dataloader.dataset)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if batch_idx < self.skip or (batch_idx - self.skip) % self.steps:
            return
        if batch_idx > self.skip:
            self.own_seconds.append((now - self._start) / self.steps)
        start = time.perf_counter()
        for _ in range(self.steps):
            self.plain_step()
        self.plain_seconds.append((time.perf_counter() - start) / self.steps)
        self._start = time.perf_counter()


def plain_step(data: TextDataModule, text: TrainingWindows) -> Callable[[], None]:
    """A training step of a plain GPT of the quickstart's size on the quickstart's text."""
    model = PlainGPT(data.vocab_size, d_model=128, n_layers=4, n_heads=4, context=data.context)
    optimizer = adamw(model)
    tokens = torch.from_numpy(text.tokens.read(0, len(text.tokens)))
    batches = windows(tokens, data.batch_size, data.context)

    def cross_entropy() -> Tensor:
        tokens, labels = next(batches)
        return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())

    return lambda: training_step(model, optimizer, cross_entropy)

"""Windows of tokens, and the samplers that order them.

Shapes: T positions.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_dsmoe.data.token_file import TokenSpan
from lightning_dsmoe.losses.cross_entropy import IGNORED as IGNORED


class TrainingWindows(Dataset[dict[str, Tensor]]):
    """Windows for training, side by side from the first token on, with labels shifted by one.

    Lightning replaces the training sampler for `overfit_batches`, so items in order must not
    overlap. Items from n = len(windows) on, which only `TrainingSampler` draws, are the same
    windows shifted: item i + n p begins p tokens after item i, for p below `n_phases`.

    Args:
        tokens: The training split, longer than `context`.
        context: Tokens in a window, T.

    Items are `input_ids` [T] and `labels` [T], int64.
    """

    def __init__(self, tokens: TokenSpan, context: int) -> None:
        self.tokens, self.context = tokens, context
        starts = len(tokens) - context
        # As many windows as fit wherever the first one starts, but at least one.
        self.n_windows = max(1, starts // context)
        self.n_phases = min(context, starts - (self.n_windows - 1) * context)

    def __len__(self) -> int:
        return self.n_windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        phase, place = divmod(index, self.n_windows)
        start = phase + place * self.context
        window = torch.from_numpy(self.tokens.read(start, start + self.context + 1))
        return {"input_ids": window[:-1], "labels": window[1:]}


class EvaluationWindows(Dataset[dict[str, Tensor]]):
    """Windows side by side, so that every token but the first is predicted exactly once.

    The last window is padded: inputs with 0, labels with -100. Any item past it is padding alone.

    Args:
        tokens: The split, longer than `context`.
        context: Tokens in a window, T.

    Items are `input_ids` [T] and `labels` [T], int64.
    """

    def __init__(self, tokens: TokenSpan, context: int) -> None:
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.context)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids = torch.zeros(self.context, dtype=torch.int64)
        labels = torch.full((self.context,), IGNORED)
        first = index * self.context
        if first < len(self.tokens):
            window = torch.from_numpy(self.tokens.read(first, first + self.context + 1))
            input_ids[: len(window) - 1] = window[:-1]
            labels[: len(window) - 1] = window[1:]
        return {"input_ids": input_ids, "labels": labels}


class TrainingSampler(DistributedSampler[int]):
    """Gives each rank the same number of windows, in a new random order every epoch.

    An epoch places windows side by side from a random first token, so that their edges move from
    epoch to epoch, and shuffles them. The order depends on seed and epoch alone, and the ranks take
    turns: what they have read together after any number of steps is a beginning of it, and the same
    one on any number of ranks with the same number of windows a step.

    Args:
        windows: The training windows.
        seed: Seed of every epoch's order.
        num_replicas: Number of ranks.
        rank: This rank.

    `start` is the number of windows, of all ranks together, that the next iteration skips.
    """

    def __init__(
        self, windows: TrainingWindows, *, seed: int, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(windows, num_replicas=num_replicas, rank=rank, seed=seed)
        self.n_windows, self.n_phases = windows.n_windows, windows.n_phases
        self.num_samples = max(1, self.n_windows // num_replicas)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        first = int(generator.integers(self.n_phases)) * self.n_windows
        # 4 bytes a window, and ids made one at a time: 100 GB of text have 400 million windows of
        # 128 tokens, which as a list of Python integers take 16 GB in each process.
        order = np.arange(self.n_windows, dtype=np.uint32)
        generator.shuffle(order)
        last = max(self.n_windows, self.num_replicas) - self.num_replicas
        for step in range(self.start, last + 1, self.num_replicas):
            # Repeated only where there are fewer windows than ranks.
            place = step + self.rank
            yield first + int(order[place % self.n_windows])


class EvaluationSampler(DistributedSampler[int]):
    """Deals windows to the ranks round-robin, each exactly once, and fills up with padding items.

    Args:
        windows: The evaluation windows.
        num_replicas: Number of ranks.
        rank: This rank.
    """

    def __init__(self, windows: EvaluationWindows, *, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(windows, num_replicas=num_replicas, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.num_samples * self.num_replicas, self.num_replicas))

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dsmoe.data.token_file import TokenSpan
from lightning_dsmoe.data.windows import (
    EvaluationSampler,
    EvaluationWindows,
    TrainingSampler,
    TrainingWindows,
)


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], TokenSpan]:
    """Tokens that are their own positions, plus 1000, in three files."""
    folder: Path = tmp_path_factory.mktemp("tokens")

    def span(length: int) -> TokenSpan:
        edges = sorted({0, min(3, length), length // 2, length})
        files = []
        for start, stop in pairwise(edges):
            files.append((folder / f"{start}-{stop}.bin", stop - start))
            np.arange(1000 + start, 1000 + stop, dtype="<u2").tofile(files[-1][0])
        return TokenSpan(files, "uint16", 2000)

    return span


sizes = st.integers(1, 20).flatmap(
    lambda context: st.tuples(st.just(context), st.integers(context + 1, 200))
)


@settings(deadline=None)
@given(sizes, st.integers(1, 4))
def test_evaluation_predicts_every_token_once(
    span: Callable[[int], TokenSpan], size: tuple[int, int], ranks: int
) -> None:
    context, length = size
    windows = EvaluationWindows(span(length), context)
    seen: Counter[int] = Counter()
    samplers = [EvaluationSampler(windows, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    assert len({len(sampler) for sampler in samplers}) == 1
    for sampler in samplers:
        assert len(list(sampler)) == len(sampler)
        for index in sampler:
            item = windows[index]
            real = item["labels"] != -100
            assert torch.equal(item["labels"][real], item["input_ids"][real] + 1)
            assert not item["input_ids"][~real].any()
            seen.update(item["labels"][real].tolist())
    assert seen == Counter(range(1001, 1000 + length))


@settings(deadline=None)
@given(sizes, st.integers(1, 4), st.integers(0, 3))
def test_training_windows_do_not_overlap_and_stay_inside(
    span: Callable[[int], TokenSpan], size: tuple[int, int], ranks: int, epoch: int
) -> None:
    context, length = size
    windows = TrainingWindows(span(length), context)
    items = []
    for rank in range(ranks):
        sampler = TrainingSampler(windows, seed=5, num_replicas=ranks, rank=rank)
        sampler.set_epoch(epoch)
        own = list(sampler)
        assert len(own) == len(sampler)
        sampler.start = ranks  # one window of each
        assert list(sampler) == own[1:]
        items += own
    starts = [int(windows[item]["input_ids"][0]) - 1000 for item in items]
    if windows.n_windows >= ranks:
        distances = np.diff(sorted(starts))
        assert (distances >= context).all()
        assert (distances % context == 0).all()
    for index, start in zip(items, starts, strict=True):
        item = windows[index]
        assert item["input_ids"].tolist() == list(range(1000 + start, 1000 + start + context))
        assert item["labels"].tolist() == [token + 1 for token in item["input_ids"].tolist()]


@settings(deadline=None)
@given(sizes)
def test_training_windows_in_order_lie_side_by_side(
    span: Callable[[int], TokenSpan], size: tuple[int, int]
) -> None:
    context, length = size
    windows = TrainingWindows(span(length), context)
    n_windows = max(1, (length - context) // context)
    assert len(windows) == n_windows
    items = range(n_windows * windows.n_phases)
    starts = [int(windows[item]["input_ids"][0]) - 1000 for item in items]
    assert starts[:n_windows] == list(range(0, n_windows * context, context))
    assert len(set(starts)) == len(starts)
    assert max(starts) + context < length


def test_training_reaches_every_token_over_the_epochs(span: Callable[[int], TokenSpan]) -> None:
    windows = TrainingWindows(span(40), 8)
    sampler = TrainingSampler(windows, seed=5)
    phases: set[int] = set()
    labels: set[int] = set()
    for epoch in range(60):
        sampler.set_epoch(epoch)
        items = [windows[index] for index in sampler]
        phases.add(min(int(item["input_ids"][0]) - 1000 for item in items))
        labels.update(label for item in items for label in item["labels"].tolist())
        assert len(items) == 4
    assert phases == set(range(8))
    assert labels == set(range(1001, 1040))


def test_same_seed_and_epoch_same_order(span: Callable[[int], TokenSpan]) -> None:
    windows = TrainingWindows(span(400), 4)
    order = list(TrainingSampler(windows, seed=5))
    assert order == list(TrainingSampler(windows, seed=5))
    assert order != list(TrainingSampler(windows, seed=6))
    later = TrainingSampler(windows, seed=5)
    later.set_epoch(1)
    assert order != list(later)

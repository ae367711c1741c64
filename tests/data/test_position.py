"""A run that goes on with another number of ranks or another batch size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_dsmoe.data import TextDataModule
from lightning_dsmoe.data.loader import ResumableLoader
from lightning_dsmoe.data.position import Position, Share, move
from lightning_dsmoe.data.windows import TrainingSampler, TrainingWindows

from .test_resume import Recorder, SaveAfterEveryBatch, trainer

WINDOWS = 21
START = Position(0, 0, 0)


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., TextDataModule]:
    text = tmp_path / "text.txt"
    # 21 windows of 8 for training, each with a beginning of its own.
    text.write_text("".join(chr(33 + (7 * i * i + 3 * i + i // 90) % 90) for i in range(197)))

    def build(**options: object) -> TextDataModule:
        settings = {"context": 8, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **options}
        return TextDataModule(str(text), **settings)  # type: ignore[arg-type]

    return build


def on_ranks(
    data: Callable[..., TextDataModule], share: Share, position: Position = START
) -> list[list[tuple[int, ...]]]:
    """The windows that all ranks read at each step of the rest of an epoch, in order."""
    windows = TrainingWindows(data()._tokens().span("train"), 8)
    assert len(windows) == WINDOWS
    steps: list[list[tuple[int, ...]]] = []
    for rank in range(share.ranks):
        sampler = TrainingSampler(windows, seed=1234, num_replicas=share.ranks, rank=rank)
        loader = ResumableLoader(
            windows, batch_size=share.batch_size, sampler=sampler, drop_last=True
        )
        loader.resume(*position)
        for step, batch in enumerate(loader):
            if step == len(steps):
                steps.append([])
            steps[step] += [tuple(row) for row in batch["input_ids"].tolist()]
        assert step == len(steps) - 1
        assert loader.windows == position.windows + len(steps) * share.windows
    return [sorted(step) for step in steps]


@pytest.mark.parametrize("share", [Share(2, 2), Share(4, 1)])
def test_all_ranks_together_read_what_one_reads(
    data: Callable[..., TextDataModule], share: Share
) -> None:
    assert on_ranks(data, share) == on_ranks(data, Share(1, 4))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (Share(2, 2), Share(1, 4)),
        (Share(2, 2), Share(1, 2)),
        (Share(1, 2), Share(2, 2)),
        (Share(4, 1), Share(2, 1)),
        (Share(1, 3), Share(2, 1)),
        (Share(1, 1), Share(2, 3)),
    ],
    ids=lambda share: f"{share.ranks}x{share.batch_size}",
)
def test_other_ranks_go_on_with_the_first_window_that_was_not_read(
    data: Callable[..., TextDataModule], old: Share, new: Share
) -> None:
    order = [windows[0] for windows in on_ranks(data, Share(1, 1))]
    n_batches = WINDOWS // old.windows
    for batches in range(1, n_batches):
        read = batches * old.windows
        limit = WINDOWS // new.windows
        position = move(Position(0, batches, read), WINDOWS, new, limit, accumulate=1)
        steps = on_ranks(data, new, position)
        assert len(steps) == limit - position.batches >= 1
        assert position.windows == min(read, WINDOWS - new.windows)
        for index, step in enumerate(steps):
            start = position.windows + index * new.windows
            assert step == sorted(order[start : start + new.windows])


@pytest.mark.parametrize(
    ("position", "accumulate", "limit", "expected"),
    [
        (Position(3, 4, 32), 1, 25, Position(3, 8, 32)),
        (Position(3, 4, 32), 4, 25, Position(3, 8, 32)),
        (Position(0, 1, 34), 1, 25, Position(0, 9, 34)),  # one batch fewer to come
        (Position(0, 1, 34), 4, 25, Position(0, 12, 34)),  # steps of 4 begin there
        (Position(0, 1, 99), 1, 25, Position(0, 24, 96)),  # less than a batch is left
        (Position(0, 1, 99), 4, 25, Position(0, 24, 96)),
        (Position(0, 1, 95), 4, 23, Position(0, 22, 95)),  # no step of 4 begins there any more
        (Position(0, 2, 8), 1, 3, Position(0, 2, 8)),  # limit_train_batches=3
        (Position(0, 2, 40), 1, 3, Position(0, 2, 40)),
    ],
)
def test_batches_are_counted_from_the_end(
    position: Position, accumulate: int, limit: int, expected: Position
) -> None:
    assert move(position, 100, Share(2, 2), limit, accumulate) == expected


def test_a_change_is_told(
    data: Callable[..., TextDataModule], caplog: pytest.LogCaptureFixture
) -> None:
    first = data()
    iterator = iter(first.train_dataloader())
    for _ in range(3):
        next(iterator)
    resumed = data(batch_size=3)
    resumed.load_state_dict(first.state_dict())
    message = r"batch_size 4 = 4 in the .* batch_size 3 = 3 now; .* with window 12 of epoch 0"
    with pytest.warns(UserWarning, match=rf"{message}.* accumulate_grad_batches .* of 0\.75, an"):
        loader = resumed.train_dataloader()
    straight = rows([batch["input_ids"] for batch in data(batch_size=1).train_dataloader()])
    assert rows([batch["input_ids"] for batch in loader]) == straight[12:]
    same = data()
    same.load_state_dict({**first.state_dict(), "ranks": 2, "batch_size": 2})
    same.train_dataloader()  # without a warning
    assert "2 rank(s) x batch_size 2 = 4 in the checkpoint, 1 rank(s)" in caplog.text


def test_checkpoints_of_version_0_1_count_batches(data: Callable[..., TextDataModule]) -> None:
    straight = [batch["input_ids"] for batch in data().train_dataloader()]
    state = {**data().state_dict(), "batches": 3}
    del state["windows"]
    resumed = data()
    resumed.load_state_dict(state)
    assert rows([batch["input_ids"] for batch in resumed.train_dataloader()]) == rows(straight[3:])
    assert resumed.state_dict()["epoch"] == 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("num_workers", [1, 4])
def test_any_number_of_workers_reads_the_same(
    data: Callable[..., TextDataModule], num_workers: int
) -> None:
    alone, shared = data().train_dataloader(), data(num_workers=num_workers).train_dataloader()
    for _ in range(2):
        expected = rows([batch["input_ids"] for batch in alone])
        assert rows([batch["input_ids"] for batch in shared]) == expected


def rows(batches: list[Tensor]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tolist()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:windows of a step")
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 2),
        ({}, 5),
        ({"accumulate_grad_batches": 2}, 1),
        ({"limit_train_batches": 3, "max_epochs": 3}, 3),
    ],
    ids=["smaller", "larger", "accumulated", "limited"],
)
def test_the_trainer_ends_epochs_where_they_end(
    data: Callable[..., TextDataModule], tmp_path: Path, options: dict[str, Any], size: int
) -> None:
    settings = {"max_epochs": 2, **options}
    straight, other = Recorder(), Recorder()
    trainer(tmp_path, callbacks=[SaveAfterEveryBatch(tmp_path)], **settings).fit(straight, data())
    run = trainer(tmp_path, **settings)
    run.fit(other, data(batch_size=size))
    limit, n_epochs = int(run.num_training_batches), settings["max_epochs"]
    loader = data(batch_size=1).train_dataloader()
    epochs = [rows([batch["input_ids"] for batch in loader]) for _ in range(n_epochs)]
    for done in range(1, len(straight.seen)):
        resumed = Recorder()
        run = trainer(tmp_path, **settings)
        path = tmp_path / f"{done}.ckpt"
        run.fit(resumed, data(batch_size=size), ckpt_path=path, weights_only=True)
        assert run.current_epoch == n_epochs
        # Later epochs are whole.
        epoch, batches = divmod(done, len(straight.seen) // n_epochs)
        whole = limit * (n_epochs - epoch - (batches > 0))
        n_first = len(resumed.seen) - whole
        first, later = rows(resumed.seen[:n_first]), resumed.seen[n_first:]
        assert rows(later) == rows(other.seen[len(other.seen) - whole :])
        # The first goes on where the other batches ended, to its own end.
        assert (n_first > 0) == (batches > 0)
        start = min(4 * batches, WINDOWS - size)
        assert first == epochs[epoch][start : start + len(first)]
        if batches and "limit_train_batches" not in options:
            unread = WINDOWS - start - len(first)
            assert unread < size * settings.get("accumulate_grad_batches", 1)
        if options == {"accumulate_grad_batches": 2} and batches % 2 == 0:
            # Steps of two batches, but for the last of an epoch.
            before = 3 * epoch + batches // 2
            assert run.global_step == before + -(-n_first // 2) + whole // limit * -(-limit // 2)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from lightning_dsmoe.data import TextDataModule
from lightning_dsmoe.data.resuming import check_same_data
from lightning_dsmoe.data.windows import TrainingWindows

pytestmark = pytest.mark.slow

BATCHES = 5


class Recorder(LightningModule):
    """Learns one number and remembers every training batch it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"])
        return self.weight**2

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert not self.training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., TextDataModule]:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + (7 * i * i + 3 * i + i // 90) % 90) for i in range(200)))

    def build(**options: object) -> TextDataModule:
        settings = {"context": 8, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **options}
        return TextDataModule(str(text), **settings)  # type: ignore[arg-type]

    return build


def trainer(tmp_path: Path, **options: object) -> Trainer:
    settings = {
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
        **options,
    }
    return Trainer(**settings)  # type: ignore[arg-type]


class SaveAfterEveryBatch(Callback):
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        assert isinstance(pl_module, Recorder)
        trainer.save_checkpoint(self.directory / f"{len(pl_module.seen)}.ckpt")


def assert_continues(seen: list[Tensor], expected: list[Tensor]) -> None:
    assert len(seen) == len(expected)
    for step, (resumed, straight) in enumerate(zip(seen, expected, strict=True)):
        assert torch.equal(resumed, straight), f"batch {step} after resuming differs"


def test_epochs_differ_and_repeat_with_the_seed(data: Callable[..., TextDataModule]) -> None:
    def two_epochs(seed: int) -> list[Tensor]:
        loader = data(seed=seed).train_dataloader()
        return [batch["input_ids"] for _ in range(2) for batch in loader]

    first = two_epochs(1)
    assert len(first) == 2 * BATCHES
    assert_continues(two_epochs(1), first)
    assert not torch.equal(torch.stack(first[:BATCHES]), torch.stack(first[BATCHES:]))
    assert not torch.equal(torch.stack(two_epochs(2)), torch.stack(first))


@pytest.mark.parametrize(
    ("accumulate", "limit_train_batches", "limit_val_batches"),
    [(1, 1.0, 0), (1, 3, 1), (2, 1.0, 1), (2, 3, 0)],
)
def test_every_checkpoint_continues_with_the_next_batch(
    data: Callable[..., TextDataModule],
    tmp_path: Path,
    accumulate: int,
    limit_train_batches: float,
    limit_val_batches: int,
) -> None:
    options = {
        "max_steps": 8,
        "accumulate_grad_batches": accumulate,
        "limit_train_batches": limit_train_batches,
        "limit_val_batches": limit_val_batches,
    }
    straight = Recorder()
    trainer(tmp_path, callbacks=[SaveAfterEveryBatch(tmp_path)], **options).fit(straight, data())
    for done in range(1, len(straight.seen)):
        resumed = Recorder()
        run = trainer(tmp_path, **options)
        run.fit(resumed, data(), ckpt_path=tmp_path / f"{done}.ckpt", weights_only=True)
        assert run.global_step == 8
        assert_continues(resumed.seen, straight.seen[done:])


def test_counting_epochs_instead_of_steps(
    data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    straight = Recorder()
    trainer(tmp_path, max_epochs=2, callbacks=[SaveAfterEveryBatch(tmp_path)]).fit(straight, data())
    assert len(straight.seen) == 2 * BATCHES
    for done in range(1, 2 * BATCHES):
        resumed = Recorder()
        path = tmp_path / f"{done}.ckpt"
        trainer(tmp_path, max_epochs=2).fit(resumed, data(), ckpt_path=path, weights_only=True)
        assert_continues(resumed.seen, straight.seen[done:])


@pytest.mark.parametrize("done", [2, BATCHES, BATCHES + 2])
def test_checkpoint_saved_after_max_steps_stopped_the_run(
    data: Callable[..., TextDataModule], tmp_path: Path, done: int
) -> None:
    straight = Recorder()
    trainer(tmp_path, max_steps=2 * BATCHES + 2).fit(straight, data())
    stopped = Recorder()
    first = trainer(tmp_path, max_steps=done)
    first.fit(stopped, data())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = Recorder()
    trainer(tmp_path, max_steps=2 * BATCHES + 2).fit(
        resumed, data(), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    assert_continues(stopped.seen + resumed.seen, straight.seen)


class ReadsSteppingBatches(Recorder):
    """Makes the Trainer build the loaders before it restores its own loops."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


@pytest.mark.parametrize(("module", "num_workers"), [(ReadsSteppingBatches, 0), (Recorder, 1)])
def test_early_loaders_and_workers_continue_too(
    data: Callable[..., TextDataModule], tmp_path: Path, module: type[Recorder], num_workers: int
) -> None:
    straight, resumed = module(), module()
    data_options = {"num_workers": num_workers}
    save = SaveAfterEveryBatch(tmp_path)
    trainer(tmp_path, max_steps=8, callbacks=[save]).fit(straight, data(**data_options))
    path = tmp_path / f"{BATCHES + 2}.ckpt"
    trainer(tmp_path, max_steps=8).fit(
        resumed, data(**data_options), ckpt_path=path, weights_only=True
    )
    assert_continues(resumed.seen, straight.seen[BATCHES + 2 :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 4}, "context was 8, is 4\\. Resume with the same data, or begin a new run"),
        ({"batch_size": 3, "seed": 7}, "settings: seed was 1234, is 7\\. Resume"),
        ({"tokenizer": "char"}, "tokenizer was 'byte', is 'char' of 33 characters\\. Resume"),
        ({"val_fraction": 0.2}, r"train_tokens was 180, is \d+ \(of other files, val_fraction or"),
    ],
)
def test_resuming_with_other_data_is_refused(
    data: Callable[..., TextDataModule], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    first = trainer(tmp_path, max_steps=1)
    first.fit(Recorder(), data())
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Recorder()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=2).fit(
            resumed, data(**change), ckpt_path=tmp_path / "one.ckpt", weights_only=True
        )
    assert resumed.seen == []


def test_evaluation_of_a_checkpoint_only_needs_its_tokenizer(
    data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    first = trainer(tmp_path, max_steps=1)
    first.fit(Recorder(), data())
    first.save_checkpoint(tmp_path / "one.ckpt")

    def validate(module: TextDataModule) -> None:
        path = tmp_path / "one.ckpt"
        trainer(tmp_path).validate(Recorder(), module, path, verbose=False, weights_only=True)

    other = data(context=4, batch_size=2)
    validate(other)
    assert other.state_dict()["batches"] == 0
    with pytest.raises(ValueError, match=r"tokenizer was 'byte', is 'char' of 33 characters$"):
        validate(data(tokenizer="char"))


def test_another_tokenizer_of_one_kind_is_called_another() -> None:
    saved, now = ({"tokenizer": {"kind": "huggingface", "json": text}} for text in ("{}", "[]"))
    with pytest.raises(ValueError, match=r"was another 'huggingface', is 'huggingface'$"):
        check_same_data(saved, now, fitting=False)


@pytest.mark.parametrize(
    "damage", [{"epoch": None}, {"batches": -1}, {"ranks": "2"}, {"batch_size": 0}, {"windows": []}]
)
def test_a_damaged_position_is_one_line(
    data: Callable[..., TextDataModule], damage: dict[str, object]
) -> None:
    state = {**data().state_dict(), **damage}
    (name,) = damage
    with pytest.raises(ValueError, match=f"^the checkpoint's position in the text: {name} must be"):
        data().load_state_dict(state)


def test_position_without_a_trainer(data: Callable[..., TextDataModule]) -> None:
    module = data()
    loader = module.train_dataloader()
    straight = [batch["input_ids"] for _ in range(2) for batch in loader]
    iterator = iter(module.train_dataloader())
    for _ in range(3):
        next(iterator)
    resumed = data()
    resumed.load_state_dict(module.state_dict())
    loader = resumed.train_dataloader()
    assert len(loader) == BATCHES
    assert_continues([batch["input_ids"] for _ in range(2) for batch in loader], straight[3:])


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_on_a_few_batches_works(
    data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    module = Recorder()
    run = trainer(tmp_path, max_epochs=2, overfit_batches=1)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "overfit.ckpt")
    assert torch.equal(*module.seen)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
@pytest.mark.parametrize(("mode", "by_callback"), [("power", False), ("binsearch", True)])
def test_training_goes_on_with_the_batch_size_that_was_found(
    data: Callable[..., TextDataModule], tmp_path: Path, mode: str, by_callback: bool
) -> None:
    search: dict[str, Any] = {"mode": mode, "max_trials": 2, "steps_per_trial": 1}
    finder = [BatchSizeFinder(**search)] if by_callback else []
    run = trainer(tmp_path, max_steps=3, callbacks=finder)
    model, text = Recorder(), data(batch_size=16)
    if not by_callback:
        Tuner(run).scale_batch_size(model, datamodule=text, **search)
    model.seen.clear()
    run.fit(model, text)
    assert text.batch_size == 4 - (mode == "binsearch")  # less a margin
    expected = Recorder()
    trainer(tmp_path, max_steps=3).fit(expected, data(batch_size=text.batch_size))
    assert_continues(model.seen[-3:], expected.seen)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled:UserWarning")
def test_overfitting_reads_windows_side_by_side(
    data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    model = Recorder()
    run = trainer(tmp_path, max_epochs=2, overfit_batches=2, limit_val_batches=0)
    run.fit(model, data())
    first, second, *again = model.seen
    text = TrainingWindows(data()._tokens().span("train"), 8).tokens.read(0, 8 * 8)
    assert torch.cat([first, second]).flatten().tolist() == text.tolist()
    assert_continues(again, [first, second])

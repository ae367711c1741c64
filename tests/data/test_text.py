from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_dsmoe.data import TextDataModule, batch_size, batch_tokens

TEXT = "abcdefghij" * 40 + "klmno–" * 10


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


class Model(LightningModule):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.shapes: list[tuple[int, ...]] = []

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.shapes.append(tuple(batch["input_ids"].shape))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch["labels"]


def quiet(tmp_path: str) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=Path(tmp_path).parent,
    )


def test_batches_are_shifted_windows(path: str) -> None:
    data = TextDataModule(path, context=8, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 13
    for batch in batches:
        assert batch["input_ids"].shape == batch["labels"].shape == (4, 8)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
        assert batch_size(batch) == 4
        assert batch_tokens(batch) == 32
    # Lightning replaces any other sampler when there are several ranks.
    assert isinstance(loader.sampler, DistributedSampler)
    assert isinstance(data.val_dataloader().sampler, DistributedSampler)


def test_setup_may_be_called_again_and_alone(path: str) -> None:
    data = TextDataModule(path, context=8)
    data.setup("fit")
    first = data.val_dataloader().dataset[0]["input_ids"]
    data.prepare_data()
    data.setup()
    assert torch.equal(first, data.val_dataloader().dataset[0]["input_ids"])


def test_fewer_windows_than_a_batch_still_train(path: str) -> None:
    loader = TextDataModule(path, context=100, batch_size=64, val_fraction=0.3).train_dataloader()
    assert [batch["input_ids"].shape for batch in loader] == [(2, 100)]


def test_vocabulary_is_known_before_setup(path: str, tmp_path: Path) -> None:
    assert TextDataModule(str(tmp_path / "missing.txt")).vocab_size == 256
    data = TextDataModule(path, tokenizer="char")
    assert data.vocab_size == 16
    assert data.tokenizer.decode(data.tokenizer.encode("a–o").tolist()) == "a–o"


def test_bytes_and_chars_per_token(path: str) -> None:
    by_byte = TextDataModule(path, val_fraction=0.1)
    by_char = TextDataModule(path, tokenizer="char", val_fraction=0.1)
    assert by_byte.bytes_per_token("val") == by_char.chars_per_token("val") == 1.0
    assert by_char.bytes_per_token("train") < by_char.bytes_per_token("val")
    assert by_char.bytes_per_token("val") == pytest.approx(
        1 / by_byte.chars_per_token("val"), rel=1e-12
    )
    assert by_char.bytes_per_token("test") == by_char.bytes_per_token("val")


@pytest.mark.parametrize("test_fraction", [0.0, 0.2])
def test_test_and_predict_read_the_test_split_or_validation(
    path: str, test_fraction: float
) -> None:
    data = TextDataModule(path, context=8, batch_size=3, test_fraction=test_fraction)
    expected = data._tokens().span("test" if test_fraction else "val")
    model = Model(256)
    quiet(path).test(model, data, verbose=False)
    assert sum(shape[0] for shape in model.shapes) == -(-(len(expected) - 1) // 8)
    predicted = quiet(path).predict(model, data)
    assert predicted is not None
    labels = torch.cat([torch.as_tensor(batch).flatten() for batch in predicted])
    assert labels[labels != -100].tolist() == expected.read(1, len(expected)).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"batch_size": -2}, "batch_size must be at least 1, got -2"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1, got 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "val_fraction=0.5, got 0.5"),
        ({"test_fraction": -0.1}, "got -0.1"),
        ({"tokenizer": "word"}, 'must be "byte", "char" or the path .* got \'word\''),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        TextDataModule(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_short_splits_are_named(path: str) -> None:
    message = r"the train split has 432 tokens, but context=1000 needs at least 1001"
    with pytest.raises(ValueError, match=message):
        TextDataModule(path, context=1000).setup("fit")
    data = TextDataModule(path, context=100)
    for stage in ("fit", "validate", "test", "predict", None):
        with pytest.raises(ValueError, match=r"the val split has 48 tokens, .* at least 101"):
            data.setup(stage)


def test_too_small_a_model_vocabulary_is_named(path: str) -> None:
    data = TextDataModule(path, context=8)
    with pytest.raises(ValueError, match=r"model's vocab_size is 255, .* has 256 tokens"):
        quiet(path).test(Model(255), data, verbose=False)

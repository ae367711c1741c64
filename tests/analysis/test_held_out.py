"""Held-out text without a data module is that of the data module."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lightning_dsmoe import TextDataModule
from lightning_dsmoe.analysis import held_out
from lightning_dsmoe.tokenizers import ByteTokenizer

FRACTIONS: Any = {"val_fraction": 0.2, "test_fraction": 0.3}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextDataModule:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number}\n" for number in range(200)))
    return TextDataModule(str(text), context=16, batch_size=4, **FRACTIONS)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("of", ["files", "tokens"])
def test_windows_are_those_of_training(
    split: Literal["val", "test"], of: str, data: TextDataModule
) -> None:
    files: Any = data.files if of == "files" else data.token_folder
    before = torch.random.get_rng_state()
    text = held_out(
        ByteTokenizer(), files, context=16, split=split, batch_tokens=4 * 16 + 15, **FRACTIONS
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    expected = [(batch["input_ids"], batch["labels"]) for batch in loader]
    assert len(text.batches) == len(expected)
    for given, batch in zip(text.batches, expected, strict=True):
        assert all(map(torch.equal, given, batch))
    assert text.n_tokens == data._size(split).tokens - 1


@pytest.mark.parametrize(("most", "read"), [(1, 16), (40, 48), (64, 64), (65, 128)])
def test_hardly_more_is_read_than_was_asked_for(most: int, read: int, data: TextDataModule) -> None:
    text = held_out(ByteTokenizer(), data.files, context=16, max_tokens=most, batch_tokens=64)  # type: ignore[arg-type]
    assert text.n_tokens == read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1, got 0.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "test_fraction must be at least 0 and leave"),
        ({"split": "test"}, "split=test needs a test_fraction above 0"),
        ({"context": 10**6}, "the val split has [0-9]+ tokens, but context=1000000 needs"),
        ({"context": 0}, "context must be at least 1, got 0"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, data: TextDataModule) -> None:
    with pytest.raises(ValueError, match=message):
        held_out(ByteTokenizer(), data.files, **options)  # type: ignore[arg-type]

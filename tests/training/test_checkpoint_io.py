"""A checkpoint is replaced as a whole or not at all, and a damaged one is not resumed."""

import os
import resource
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_dsmoe.training.checkpoint_io import SafeCheckpointIO
from lightning_dsmoe.training.language_model import DSMoELanguageModel

Fit = Callable[..., Trainer]


@pytest.fixture
def fit(
    make_one_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., DataLoader[Any]],
    make_trainer: Callable[..., Trainer],
) -> Fit:
    def run(steps: int = 1, ckpt_path: Path | str | None = None, **options: Any) -> Trainer:
        trainer = make_trainer(max_steps=steps, logger=False, **options)
        trainer.fit(make_one_model(), make_loader(3), make_loader(3), ckpt_path=ckpt_path)
        return trainer

    return run


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """Let writing to any file fail beyond a number of bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_is_written_beside_its_place(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fit()
    folder = tmp_path / "new" / "checkpoints"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    replaced: list[tuple[Path, Path]] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        assert torch.load(self)["global_step"] == 1  # whole before it has its name
        replaced.append((self, target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    trainer.save_checkpoint(folder / "last.ckpt")
    [(temporary, place)] = replaced
    assert place == folder / "last.ckpt"
    assert temporary.parent == folder
    assert temporary.suffix != ".ckpt"
    assert os.listdir(folder) == ["last.ckpt"]


@pytest.mark.parametrize("room", [0, 5000, 100_000])
def test_a_full_disk_leaves_the_earlier_checkpoint(room: int, fit: Fit, tmp_path: Path) -> None:
    trainer = fit()
    folder = tmp_path / "checkpoints"
    path = folder / "last.ckpt"
    trainer.save_checkpoint(path)
    before = path.read_bytes()
    assert len(before) > room
    with full_disk(room), pytest.raises(OSError, match=r"no checkpoint was written: .*last\.ckpt"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == before
    assert os.listdir(folder) == ["last.ckpt"]


def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        SafeCheckpointIO().save_checkpoint({"code": lambda: None}, tmp_path / "last.ckpt")
    assert not os.listdir(tmp_path)


def test_remote_addresses_and_other_plugins_stay_with_lightning(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(TorchCheckpointIO):
        pass

    assert type(fit(plugins=[Other()]).strategy.checkpoint_io) is Other
    io = fit().strategy.checkpoint_io
    assert type(io) is SafeCheckpointIO
    calls: list[dict[str, Any]] = []
    for name in ("save_checkpoint", "load_checkpoint"):
        monkeypatch.setattr(TorchCheckpointIO, name, lambda *args, **kwargs: calls.append(kwargs))
    io.save_checkpoint({}, "memory://run/last.ckpt")
    io.load_checkpoint("https://example.org/last.ckpt")
    io.load_checkpoint("https://example.org/last.ckpt", weights_only=False)
    assert [call.get("weights_only") for call in calls] == [None, True, False]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_damaged_files_are_named(
    command: str, fit: Fit, make_loader: Callable[..., DataLoader[Any]], tmp_path: Path
) -> None:
    trainer = fit()
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    whole = path.read_bytes()

    def run() -> object:
        if command == "fit":
            return fit(2, path)
        return trainer.validate(trainer.lightning_module, make_loader(3), path, verbose=False)

    run()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged or not a checkpoint"):
        run()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match=r"last\.ckpt .*is compressed"):
        run()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint:UserWarning")
def test_a_module_of_another_kind_resumes_under_the_same_trainer(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    path = tmp_path / "theirs.ckpt"
    for ckpt_path in (None, path):
        trainer = make_trainer(max_steps=1 if ckpt_path is None else 2, limit_val_batches=0)
        trainer.strategy.checkpoint_io = SafeCheckpointIO()
        trainer.fit(BoringModel(), ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(path)
    assert trainer.global_step == 2

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_dsmoe.training.run_folder import run_folder

from ..remote_logger import Remote


@pytest.fixture
def make_remote() -> type[Remote]:
    return Remote


def make_trainer(folder: Path, logger: Any, **options: Any) -> Trainer:
    return Trainer(logger=logger, default_root_dir=folder, accelerator="cpu", **options)


def test_log_directory_of_a_logger_that_has_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CSVLogger(tmp_path, name="logs"))
    assert run_folder(trainer) == Path(str(trainer.log_dir)) == tmp_path / "logs" / "version_0"


@pytest.mark.parametrize(
    ("save_dir", "version", "expected"),
    [
        ("logs", "b1x2", "logs/project/b1x2"),
        ("logs", 7, "logs/project/version_7"),
        (None, "b1x2", "root/project/b1x2"),
        ("logs", None, "logs/project/version_3"),
    ],
)
def test_name_and_version_of_the_first_logger(
    save_dir: str | None,
    version: int | str | None,
    expected: str,
    make_remote: Callable[..., Any],
    tmp_path: Path,
) -> None:
    for name in ("version_2", "version_old"):
        (tmp_path / "logs" / "project" / name).mkdir(parents=True)
    remote = make_remote(None if save_dir is None else tmp_path / save_dir, version=version)
    trainer = make_trainer(tmp_path / "root", [remote, CSVLogger(tmp_path / "more")])
    assert run_folder(trainer) == run_folder(trainer) == tmp_path / expected


def test_without_a_logger_each_trainer_has_a_folder(tmp_path: Path) -> None:
    trainers = [make_trainer(tmp_path, False) for _ in range(2)]
    found = [run_folder(trainer) for trainer in trainers * 2]
    assert found == [tmp_path / "version_0", tmp_path / "version_1"] * 2


def test_a_trial_run_has_no_folder(make_remote: Callable[..., Any], tmp_path: Path) -> None:
    for logger in (False, make_remote(tmp_path)):
        assert run_folder(make_trainer(tmp_path, logger, fast_dev_run=True)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_logger_without_a_name_or_a_folder(
    make_remote: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remote = make_remote("", version="b1x2")
    assert run_folder(make_trainer(tmp_path, remote)) == tmp_path / "project" / "b1x2"
    monkeypatch.setattr(type(remote), "name", None)
    remote = make_remote(tmp_path / "logs", version="b1x2")
    assert run_folder(make_trainer(tmp_path, remote)) == tmp_path / "logs" / "b1x2"

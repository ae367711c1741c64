import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from lightning_dsmoe.cli import main


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int | str | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [
            line for line in self.err.splitlines() if line.startswith("lightning-dsmoe: error:")
        ]


class Run(NamedTuple):
    """A trained model: its log directory and what `fit` was called with."""

    folder: Path
    words: list[str]

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "checkpoints" / "last.ckpt")

    @property
    def artifact(self) -> str:
        return str(self.folder / "sparse")


def run(*words: str, environment: dict[str, str] | None = None) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with (
        mock.patch.object(sys, "argv", ["lightning-dsmoe"]),
        mock.patch.dict(os.environ, environment or {}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        # Every run has a directory of its own, so this is said whenever a checkpoint is loaded.
        warnings.filterwarnings("ignore", "The dirpath has changed")
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def uncompiled(nothing_compiles: None) -> None:
    """Commands take no switch points."""


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    """Run a command in this process, which is much faster than starting another one."""
    return run


@pytest.fixture(scope="session")
def config() -> Callable[[str], str]:
    """Path of a shipped configuration."""
    return lambda name: str(files("lightning_dsmoe.cli_configs").joinpath(name))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """Options that make any of the small configurations train for two steps on a little text."""
    shared = tmp_path_factory.mktemp("text")
    text = shared / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i} # é€\n" for i in range(200)))

    def options(folder: Path) -> list[str]:
        return [
            f"--data.init_args.files={text}",
            f"--data.init_args.cache_dir={shared}",
            "--data.init_args.context=16",
            "--data.init_args.batch_size=2",
            "--model.init_args.d_model=16",
            "--model.init_args.n_layers=2",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=2",
            "--trainer.limit_val_batches=2",
            "--trainer.limit_test_batches=2",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--trainer.logger.init_args.save_dir={folder}",
        ]

    return options


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]], config: Any
) -> Run:
    """The quickstart after two steps."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["-c", config("quickstart.yaml"), *tiny(folder)]
    outcome = run("fit", *words)
    assert outcome.code == 0, outcome.err
    return Run(folder / "quickstart" / "version_0", words)


def words_of(trained: Run, command: str, output: Path) -> list[str]:
    """Words of a command that measures the trained model on its text, and where it writes."""
    [files] = [word for word in trained.words if word.startswith("--data.init_args.files=")]
    return [
        command,
        f"--ckpt_path={trained.checkpoint}",
        f"--files={files.partition('=')[2]}",
        f"--output={output}",
        "--max_tokens=300",
        "--batch_tokens=64",
        *([] if command == "prune" else ["--device=cpu"]),
    ]


@pytest.fixture
def measuring(trained: Run, tmp_path: Path) -> Callable[[str, str], list[str]]:
    """`words_of` a command that writes into the folder of the test."""
    return lambda command, output: words_of(trained, command, tmp_path / output)

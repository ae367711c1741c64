import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_dsmoe.cli import main

from .page import FILES, ROOT, TINY, WIDTH

TEXT = "".join(f"def f{i}(x):\n    return x * {i}\n" for i in range(200))

_FITTED: set[tuple[str, ...]] = set()


@pytest.fixture
def start(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run a command of the library in this process; gives what it printed."""

    def run(words: list[str]) -> str:
        if "fit" in words and tuple(words) in _FITTED:
            return ""  # another page shows the same training
        _FITTED.add(tuple(words))
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run in a folder that is used already
            code: int | str | None = 0
            try:
                main(words)
            except SystemExit as stop:  # help and --print_config end like this
                code = stop.code
        printed = capsys.readouterr()
        assert not code, f"{words}: {printed.err}"
        return printed.out

    return run


def furnish(folder: Path) -> None:
    """What every page expects to find in the current folder."""
    (folder / "cli_configs").symlink_to(ROOT / "cli_configs")
    (folder / "input.txt").write_text(TEXT)
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "one.txt").write_text(TEXT)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs after the quickstart, which all pages share."""
    folder = tmp_path_factory.mktemp("quickstart")
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-dsmoe"])
        main(["fit", "-c", "cli_configs/quickstart.yaml", *TINY, WIDTH, FILES])
    return folder / "runs"


@pytest.fixture
def workplace(
    tmp_path: Path, quickstart: Path, monkeypatch: pytest.MonkeyPatch, nothing_compiles: None
) -> Iterator[Path]:
    """A folder with what the commands expect to find, the trained quickstart among it."""
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-dsmoe"])
    furnish(tmp_path)
    shutil.copytree(quickstart, tmp_path / "runs")
    yield tmp_path
    sys.modules.pop("my_parts", None)

"""The command line of the benchmark of the paper's claims."""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_calls_run_apart_and_a_failure_stops_no_other(benchmark_modules: SimpleNamespace) -> None:
    calls = [(4.0,), (-1.0,), (9.0,)]
    found = dict(benchmark_modules.reproduce.apart(math.sqrt, calls, processes=2))
    assert (found[0], found[2]) == (2.0, 3.0)
    assert isinstance(found[1], ValueError)
    [(_, process)] = benchmark_modules.reproduce.apart(os.getpid, [()], processes=1)
    assert process != os.getpid()


def test_runs_that_are_there_are_not_repeated(
    benchmark_modules: SimpleNamespace,
    models: ModuleType,
    all_hold: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reproduce = benchmark_modules.reproduce
    done: list[str] = []

    def apart(function: object, calls: list[Any], *, processes: int) -> Iterator[tuple[int, Any]]:
        for place, (settings, *_) in enumerate(calls):
            if settings["model"] == failing:
                yield place, MemoryError("no room")
                continue
            done.append(f"{settings['model']}, {settings['seed']}")
            yield place, all_hold[settings["model"]][1] | {"settings": settings}

    def start(*arguments: str) -> None:
        words = ["--text", "text.txt", "--json", "runs.json", "--output", "claims.md"]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *words, *arguments])
        done.clear()
        reproduce.main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(reproduce, "apart", apart)
    Path("text.txt").write_text("one text")
    failing = models.DENSE
    with pytest.raises(SystemExit, match="1 of 8 runs failed"):
        start("--seeds", "1")
    assert len(done) == 7
    failing = ""
    start("--seeds", "1")
    assert done == ["dense, 1"]
    assert Path("claims.md").read_text() in capsys.readouterr().out
    start("--seeds", "1", "2")
    assert {name[-1] for name in done} == {"2"}
    start("--seeds", "1", "2")
    assert not done
    start("--seeds", "1", "--steps", "7")
    assert len(done) == 8
    Path("text.txt").write_text("another text")
    start("--seeds", "1")
    assert len(done) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "none.txt"], "there is no file none.txt"),
        (["--text", "text.txt", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["--text", "text.txt", "--picture", "a.txt"], "--picture must end in .svg or .png"),
    ],
)
def test_mistakes_are_said_in_one_line(
    benchmark_modules: SimpleNamespace,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark_modules.reproduce.main()
    assert message in capsys.readouterr().err

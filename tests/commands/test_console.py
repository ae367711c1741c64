"""Output for any console, and for readers that leave early."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from lightning_dsmoe.cli import main
from lightning_dsmoe.commands.console import console_output


@contextlib.contextmanager
def closed_pipe() -> Iterator[io.TextIOWrapper]:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        yield stream


def small() -> None:
    print("left in the buffer")


def large() -> None:
    print("more than the buffer holds" * 10_000)


def flushed() -> None:
    print("a token", flush=True)


def table() -> None:
    Console().print(Table("plan", "loss"))


def leaving() -> None:
    print("help")
    raise SystemExit(0)


@pytest.mark.parametrize("say", [small, large, flushed, table, leaving])
def test_a_closed_pipe_ends_quietly(
    say: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        closed_pipe() as pipe,
        contextlib.redirect_stdout(pipe),
        pytest.raises(SystemExit) as stop,
        console_output(),
    ):
        say()
    assert stop.value.code == 141
    assert capsys.readouterr().err == ""


def test_other_ends_stay_as_they_are() -> None:
    with pytest.raises(SystemExit, match="3"), console_output():
        raise SystemExit(3)
    with pytest.raises(KeyError), console_output():
        raise KeyError
    with pytest.raises(BrokenPipeError), console_output():
        raise BrokenPipeError(32, "connection of a logger")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-dsmoe"])
    with (
        open("/dev/full", "w", encoding="utf-8") as full,
        contextlib.redirect_stdout(full),
        pytest.raises(SystemExit) as stop,
    ):
        main(["configs"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_what_an_encoding_lacks_is_replaced(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-dsmoe"])
    words = [f"--artifact={trained.artifact}", "--prompt=alpha €世", "--max_new_tokens=0"]
    western = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="\n")
    with contextlib.redirect_stdout(western):
        main(["generate", *words])
    assert western.buffer.getvalue() == b"alpha \x80?\n"

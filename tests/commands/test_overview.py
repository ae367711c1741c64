"""The help on all commands, and what a call without one is told."""

from typing import Any

from lightning_dsmoe.commands.overview import TRAINING, overview
from lightning_dsmoe.commands.tools import SENTENCES, TOOLS


def test_each_command_has_a_sentence(cli: Any) -> None:
    shown = cli("--help").out
    assert shown == overview() + "\n"
    for word in ("--debug", "--import", "--help"):
        assert word in shown
    for name, tool in TOOLS.items():
        assert (tool.__doc__ or "").partition("\n")[0] == SENTENCES[name]
        assert SENTENCES[name].split()[:3] == shown.partition(f"    {name} ")[2].split()[:3]
    for name in (*TRAINING, *TOOLS):
        [line] = [line for line in shown.splitlines() if line.startswith(f"    {name} ")]
        assert line[24].isupper()
    assert max(map(len, shown.splitlines())) <= 80


def test_a_command_is_asked_for(cli: Any) -> None:
    run = cli()
    assert run.code == 2
    assert run.err.startswith("lightning-dsmoe: error: a command is missing: fit, validate")

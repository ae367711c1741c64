"""A mistake in a user's own code costs one line, which names the place."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.commands.errors import in_one_line

PARTS = """from dataclasses import dataclass
import torch
from lightning import Callback
from lightning_dsmoe.routing import LinearRouter, Selection


@dataclass(frozen=True)
class Half(Selection):
    k: int = 1

    def __post_init__(self):
        if self.k > 5:
            raise KeyError("k")

    def check(self, n_experts):
        pass

    def mask(self, probs):
        return probs > unknown


class Reshaping(LinearRouter):
    def forward(self, x):
        return super().forward(x.view(-1, 3, 5))


class Failing(Callback):
    def on_train_batch_end(self, *args):
        [][3]
"""
MODEL = "--model.init_args."


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of its own name, since a module is imported once."""
    name = f"parts_of_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["{model}expert_selection={parts}.Half"],
            "NameError: name 'unknown' is not defined, raised in {parts}.py, line 19, in mask",
        ),
        (
            ["{model}expert_selection={parts}.Half", "{model}expert_selection.k=9"],
            "KeyError: 'k', raised in {parts}.py, line 13, in __post_init__",
        ),
        (
            ["{model}feed_forward.init_args.router={parts}.Reshaping"],
            "RuntimeError: shape '[-1, 3, 5]' is invalid for input of size 512, raised in "
            "{parts}.py, line 24, in forward",
        ),
        (
            ["--trainer.callbacks+={parts}.Failing"],
            "IndexError: list index out of range, raised in {parts}.py, line 29, in "
            "on_train_batch_end",
        ),
    ],
)
def test_parts_of_a_configuration(
    words: list[str], message: str, parts: str, cli: Any, config: Any, tiny: Any, tmp_path: Path
) -> None:
    names = {"parts": parts, "model": MODEL}
    given = [word.format(**names) for word in words]
    outcome = cli("fit", "-c", config("quickstart.yaml"), *tiny(tmp_path), *given)
    [line] = outcome.errors
    hint = "; --debug shows the traceback"
    assert line == f"lightning-dsmoe: error: {message.format(**names)}{hint}"
    assert "Traceback" not in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import torch\n1 / 0\n", "ZeroDivisionError: division by zero, raised in {}, line 2"),
        ("def f(:\n", "SyntaxError: invalid syntax, raised in {}, line 1"),
    ],
)
def test_a_module_that_cannot_be_imported(
    content: str, message: str, parts: str, cli: Any, config: Any, tiny: Any, tmp_path: Path
) -> None:
    (tmp_path / f"{parts}.py").write_text(content)
    router = f"{MODEL}feed_forward.init_args.router={parts}.Router"
    for words in (["-c", config("quickstart.yaml"), *tiny(tmp_path), router], ["--import", parts]):
        [line] = cli("fit", *words).errors
        assert message.format(f"{parts}.py") in line


def test_the_deepest_line_of_ones_own_code_is_named(
    parts: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / f"{parts}.py").write_text(
        "import json\ndef outer():\n    inner()\ndef inner():\n    json.loads('{')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = import_module(parts)
    with pytest.raises(ValueError, match="Expecting") as caught:
        module.outer()
    assert f"raised in {parts}.py, line 5, in inner; --debug" in in_one_line(caught.value)


def test_the_librarys_own_refusals_name_no_place(cli: Any) -> None:
    for words in (["configs", "--name=absent"], ["calibrate", "--ckpt_path=absent.ckpt"]):
        [line] = cli(*words).errors
        assert "raised in" not in line

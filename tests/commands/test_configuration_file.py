"""Files of options that say nothing, or not what they should."""

from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.commands.configuration_file import options_in

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("content", ["", "\n", "# trainer:\n", "---\n", "null\n"])
def test_a_file_without_options_adds_nothing(content: str) -> None:
    assert options_in(content, "my.yaml") == "{}"


@pytest.mark.parametrize(
    "content",
    [
        "trainer: {max_steps: 3}\nckpt_path: null\n",
        "a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x\n",
        "list: [{a: 1}, {a: 1}]",
    ],
)
def test_options_stay_as_they_are(content: str) -> None:
    assert options_in(content, "my.yaml") == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "my.yaml must hold options such as .*, got a list"),
        ("hello", "got 'hello'"),
        ("trainer:\n\tmax_steps: 3", r"not YAML: .*'\\t'.*, in line 2, column 1"),
        ("{a: 1", "my.yaml is not YAML: .*line 1"),
        ("a: 1\n---\nb: 2\n", "found another document, in line 2"),
        ("a\0", "my.yaml is not YAML: .*x0000"),
        ("trainer:\n  a: 1\ntrainer:\n  b: 2\n", "my.yaml names 'trainer' twice, in line 3"),
        ("a:\n- {b: 1, b: 2}", "names 'b' twice, in line 2"),
        ("trainer:\n#  max_steps: 3\n", "my.yaml has nothing under 'trainer', in line 1"),
        ("? [a]\n: 3\n", "a key that is not a name, in line 1"),
    ],
)
def test_what_holds_no_options_is_named_with_its_place(content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options_in(content, "my.yaml")


def test_overlays(cli: Any, config: Any, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    words = ["fit", "-c", config("quickstart.yaml")]
    printed = cli(*words, "--print_config").out
    overlay.write_text("# nothing yet\n")
    assert cli(*words, "-c", str(overlay), "--print_config").out == printed
    overlay.write_text("trainer: {max_steps: 3}\n", encoding="utf-16")
    for path, named in {
        str(overlay): "overlay.yaml is text in UTF-16, only UTF-8 is read",
        "": "config must name a file, got ''",
    }.items():
        outcome = cli(*words, "-c", path)
        assert outcome.code in (1, 2)
        assert [named in line for line in outcome.errors] == [True], outcome.err

"""What the README shows is what happens."""

import contextlib
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe import SelectionPlan, TopK
from lightning_dsmoe.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    "--data.init_args.context=16",
    "--data.init_args.batch_size=2",
    "--model.init_args.d_model=16",
    "--model.init_args.n_layers=2",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
]
STEPS = "--trainer.callbacks.init_args.steps=1"
FINISHED = {"cli_configs/callbacks/sparse_finishing.yaml", "cli_configs/shakespeare_long.yaml"}
MEASURING = ("sweep", "calibrate", "prune", "report")
SHORT = {command: ["--files=input.txt", "--batch_tokens=64"] for command in MEASURING}
SHORT["certify"] = ["--files=input.txt"]


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found
    return found


def commands(program: str) -> list[list[str]]:
    """Each line of the console blocks, and each command in the prose, that starts a program."""
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    shown = [line for block in blocks("console") for line in block.splitlines()]
    shown += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    words = [shlex.split(line, comments=True) for line in shown if line.startswith(f"{program} ")]
    assert words
    return [line[1:] for line in words]


def start(words: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run in a folder that is used already
        main(words)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_compiles: None) -> Path:
    """A folder with what the commands expect to find."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-dsmoe"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cli_configs").symlink_to(ROOT / "cli_configs")
    text = "".join(f"def f{i}(x):\n    return x * {i}\n" for i in range(100))
    (tmp_path / "input.txt").write_text(text)
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "one.txt").write_text(text)
    return tmp_path


def test_python_runs(workplace: Path) -> None:
    block, sparse, more = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["moe"].router.weight.grad.abs().sum() > 0
    assert names["routing"].probs.shape == (8, 32, 16)
    names = {}
    exec(compile(sparse, "README.md", "exec"), names)
    assert names["tokens"].shape == (1, 22)
    assert (workplace / "sparse_model" / "config.json").is_file()
    exec(compile(more, "README.md", "exec"), names)  # "on the model above"
    assert names["texts"].shape == (2, 22)


def test_commands_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainings = [words for words in commands("lightning-dsmoe") if "-c" in words]
    for words in trainings:
        own = [] if "--data.init_args.files" in words else ["--data.init_args.files=input.txt"]
        phase = [STEPS] if {*words} & FINISHED else []
        start([*words, *TINY, *own, *phase])
    assert len(list(workplace.glob("runs/*/version_*/metrics.csv"))) == len(trainings)

    SelectionPlan.uniform(2, experts=TopK(2)).save("plan.json")  # as calibrate would
    generations = [words for words in commands("lightning-dsmoe") if words[0] == "generate"]
    assert generations
    for words in generations:
        capsys.readouterr()
        start([*words, "--max_new_tokens=3"])
        assert len(capsys.readouterr().out) >= 2

    others = [w for w in commands("lightning-dsmoe") if w not in [*trainings, *generations]]
    assert ["configs"] in others
    assert ["--help"] in others
    for words in others:
        capsys.readouterr()
        with contextlib.suppress(SystemExit):  # help ends like this
            start([*words, *SHORT.get(words[0], [])])
        assert capsys.readouterr().out


def test_overlay_is_accepted(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("yaml"):
        (workplace / "overlay.yaml").write_text(block)
        files = "--data.init_args.files=input.txt"
        start(["fit", "-c", "cli_configs/quickstart.yaml", "-c", "overlay.yaml", *TINY, files])
        [log] = workplace.glob("runs/quickstart/version_0/metrics.csv")
        header = log.read_text().splitlines()[0]
        for plan in re.findall(r"^ {10}(\w+): {experts", block, re.MULTILINE):
            assert f"val/sparse/{plan}/loss" in header


def test_what_is_named_exists() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = commands("make")
    assert named
    assert {word for words in named for word in words} <= set(targets)
    links = re.findall(r"\]\(([^)]+)\)", README)
    missing = [
        link
        for link in links
        if not link.startswith("https://") and not (ROOT / link.partition("#")[0]).is_file()
    ]
    assert not missing

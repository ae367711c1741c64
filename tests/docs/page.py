"""A Markdown page whose blocks are run in order, by a model that trains for a moment."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
WIDTH = "--model.init_args.d_model=16"
TINY = [
    "--data.init_args.context=16",
    "--data.init_args.batch_size=2",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
FILES = "--data.init_args.files=input.txt"
STEPS = "--trainer.callbacks.init_args.steps=1"
PHASES = ("sparse_finishing.yaml", "shakespeare_long.yaml", "finishing.yaml")
"""Configurations whose last phase has to be shorter than two steps."""
MEASURING = {
    command: ["--files=input.txt", "--batch_tokens=64", "--max_tokens=300"]
    for command in ("sweep", "calibrate", "prune", "report")
}
MEASURING["certify"] = ["--files=input.txt"]
SMALLER = {
    "context=128, batch_size=12": "context=16, batch_size=2",
    "context=64, batch_size=4": "context=16, batch_size=2",
    "    128,  # width\n": "    16,\n",
    "    128,\n    4,\n": "    16,\n    4,\n",
    "max_steps=1000, gradient_clip_val=1.0, val_check_interval=250": (
        "max_steps=2, val_check_interval=2, limit_val_batches=1, limit_test_batches=1"
    ),
    "max_steps=1000,\n    gradient_clip_val=1.0,\n    val_check_interval=250,": (
        "max_steps=2, val_check_interval=2, limit_val_batches=1,"
    ),
    "max_steps=20, limit_val_batches=2": "max_steps=12, limit_val_batches=1",
    "max_new_tokens=50": "max_new_tokens=4",
    "max_new_tokens=100": "max_new_tokens=4",
}
"""What a page says, and what the test runs in its place."""
DEVICES = "--trainer.devices"


class Block(NamedTuple):
    """A fenced block: its language, the file that its title names, and its text."""

    language: str
    file: str | None
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    fences = re.findall(
        r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', page, re.DOTALL | re.MULTILINE
    )
    return [Block(language, file or None, text) for language, file, text in fences]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


def commands(page: str, program: str) -> list[list[str]]:
    """Each line of the console blocks, and each command in the prose, that starts a program."""
    lines = [line for b in blocks(page) if b.language == "console" for line in b.text.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]
    return [line[1:] for line in words]


def shortened(words: list[str]) -> list[str]:
    """The same command, for a moment's work."""
    command, *options = words
    if "--help" in words or any("help" in word for word in options):
        return words
    if command == "generate":
        return [*words, "--max_new_tokens=3"]
    if command == "fit":
        several = DEVICES in words or any("/scale/" in word for word in words)
        rest = ["--print_config"] if several and "--print_config" not in words else []
        own = [] if any("files" in word for word in words) else [FILES]
        phase = [STEPS] if any(word.endswith(PHASES) for word in words) else []
        width = [] if any(word.endswith("upcycle.yaml") for word in words) else [WIDTH]
        # What the page resumes has its sizes already; later options win.
        return [*words, *TINY, *width, *own, *phase, *rest]
    return [*words, *MEASURING.get(command, [])]


def smaller(code: str) -> str:
    """The same Python code, for a moment's work."""
    for said, run in SMALLER.items():
        code = code.replace(said, run)
    return code


def run_page(page: Path, start: Callable[[list[str]], None]) -> dict[str, Any]:
    """Run the blocks of a page in the current folder, and give what its Python code has named."""
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(smaller(block.text), str(page), "exec"), names)
        elif block.language == "console":
            for line in block.text.splitlines():
                program, *words = shlex.split(line, comments=True) or [""]
                if program == "lightning-dsmoe":
                    start(shortened(words))
    return names

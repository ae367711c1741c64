"""What the tutorials and the how-to pages show is what happens."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_dsmoe import SelectionPlan, TopK
from lightning_dsmoe.cli import TOOLS
from lightning_dsmoe.inference import SparseModel

from .page import ROOT, SMALLER, blocks, commands, run_page

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
RUN = [
    ROOT / "README.md",
    DOCS / "index.md",
    *sorted(DOCS.glob("tutorials/*.md")),
    *sorted(DOCS.glob("how-to/*.md")),
]
SLOW = {"README", "index", "how_sparse", "mi_weights", "resume", "train_by_yaml"}
PAGES = sorted(DOCS.rglob("*.md"))
Start = Callable[[list[str]], str]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in RUN],
    ids=name,
)
def test_blocks_run(
    page: Path, workplace: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparseModel, "tune", lambda model: None, raising=False)  # takes minutes
    SelectionPlan(experts=TopK(2)).save("plan.json")  # as calibrate would
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Trainers of a page share folders and machines
        run_page(page, start)
    for written in ("sweep", "report.html", "pruned", "sparse_model"):
        if f"`{written}" in page.read_text(encoding="utf-8") and page.parent.name == "tutorials":
            assert (workplace / written).exists()


def test_what_is_made_smaller_is_said_somewhere() -> None:
    shown = [block for page in RUN for block in blocks(page.read_text(encoding="utf-8"))]
    code = "".join(block.text for block in shown if block.language == "python")
    assert [said for said in SMALLER if said not in code] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {words[0] for words in commands(text, "make")} <= {*targets}
    files = r"\b(?:cli_configs|benchmarks|examples|docs)/[\w/]+\.(?:yaml|py|md)"
    named = {*re.findall(files, text)}
    missing = [path for path in sorted(named) if not (ROOT / path).is_file()]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing += [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert missing == []


@pytest.mark.parametrize("command", TOOLS)
def test_the_reference_has_every_option(command: str, workplace: Path, start: Start) -> None:
    text = (DOCS / "reference" / "command_line.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    if command not in ("generate", "configs"):
        section += text.partition("## Text to measure on")[2].partition("\n## ")[0]
    options = {*re.findall(r"^  (--\w+)", start([command, "--help"]), re.MULTILINE)}
    options -= {"--config", "--print_config", "--import", "--debug"}  # of every command
    assert options
    assert [option for option in sorted(options) if f"`{option}`" not in section] == []


def test_lines_of_the_results_are_few() -> None:
    assert len((DOCS / "results.md").read_text().splitlines()) <= 150

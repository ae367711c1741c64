"""Routers, experts and selections from a module that is not the library's."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.cli import main
from lightning_dsmoe.inference import load_sparse

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "own_parts.md").read_text(encoding="utf-8")
UNKNOWN = (
    r"'my_parts\.\w+' is not a known \w+; "
    "import the module that defines it first, if you trust it: "
)
HOW = "import my_parts in Python, --import my_parts on the command line"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}[^\n]*\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory, cli: Any, trained: Any) -> Path:
    """The folder in which the page's parts were trained."""
    folder = tmp_path_factory.mktemp("own")
    module, *_ = blocks("python")
    [overlay] = blocks("yaml")
    (folder / "my_parts.py").write_text(module)
    (folder / "my_parts.yaml").write_text(overlay)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        more = [f"--trainer.logger.init_args.save_dir={folder / 'runs'}"]
        outcome = cli("fit", *trained.words, "-c", str(folder / "my_parts.yaml"), *more)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def place(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, in a process that has not imported the parts."""
    monkeypatch.chdir(own_run)
    monkeypatch.syspath_prepend(own_run)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    return own_run / "runs" / "quickstart" / "version_0"


@pytest.mark.parametrize("command", ["sweep", "calibrate", "prune", "report"])
def test_tools_say_how_to_open_a_model_of_own_parts(command: str, cli: Any, place: Path) -> None:
    words = {"calibrate": ["--budget=0.5"], "prune": [f"--plan={place}/sparse/plan.json"]}
    checkpoint = f"--ckpt_path={place}/checkpoints/last.ckpt"
    outcome = cli(command, checkpoint, *words.get(command, []))
    assert outcome.code == 1
    assert re.search(UNKNOWN + HOW, outcome.err)
    assert "my_parts" not in sys.modules


def test_tools_open_it_once_the_module_is_imported(
    cli: Any, place: Path, measuring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = f"{place}/checkpoints/last.ckpt"
    for words in (["--ckpt", last], ["--artifact", f"{place}/sparse"]):
        assert re.search(UNKNOWN + HOW, cli("generate", *words).err)
        outcome = cli("generate", "--import", "my_parts", *words, "--max_new_tokens=3")
        assert outcome.code == 0, outcome.err
        monkeypatch.delitem(sys.modules, "my_parts")
    plan = place / "near_best.json"
    near = '{"selection": "NearBest", "share": 0.9}'
    every = '{"selection": "AllExperts"}'
    plan.write_text(
        f'{{"format_version": 1, "experts": [{near}, {near}], "attention": [{every}, {every}]}}'
    )
    words = [*measuring("prune", "pruned"), f"--ckpt_path={last}", f"--plan={plan}"]
    outcome = cli(*words, "--import=json", "--import=my_parts")
    assert outcome.code == 0, outcome.err
    assert "On the other half the loss is" in outcome.out


def test_python_says_the_same_and_the_lines_of_the_page_run(
    place: Path, nothing_compiles: None, capsys: Any
) -> None:
    with pytest.raises(ValueError, match=UNKNOWN + HOW):
        load_sparse(place / "sparse")
    _, lines, _ = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(lines, "own_parts.md", "exec"), names)
    assert capsys.readouterr().out.startswith("def ")
    router = names["model"].decoder.blocks[0].feed_forward.router
    assert (type(router).__name__, router.scale) == ("ScaledRouter", 8.0)


def test_a_plan_of_unknown_selections_says_how(cli: Any, trained: Any, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(
        '{"format_version": 1, "experts": [{"selection": "Unheard"}], "attention": [{}]}'
    )
    outcome = cli("generate", f"--ckpt={trained.checkpoint}", f"--plan={tmp_path}/plan.json")
    assert "is not a selection; known are AllExperts" in outcome.err
    assert "--import MODULE" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--import", "absent_parts"], "there is no module 'absent_parts' in this folder"),
        (
            ["--import=own_parts.py"],
            "takes the name of a module, such as my_parts, got 'own_",
        ),
        (["--import"], "takes the name of a module, such as my_parts, got ''"),
        (["--import", "broken_parts"], "No module named 'absent_parts'"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    words: list[str], message: str, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_parts.py").write_text("import absent_parts\n")
    monkeypatch.syspath_prepend(tmp_path)
    outcome = cli("configs", *words)
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert message in outcome.errors[0]


def test_the_current_folder_is_looked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "parts_beside.py").write_text("print('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    monkeypatch.setattr(sys, "argv", ["lightning-dsmoe", "configs", "--import", "parts_beside"])
    monkeypatch.setenv("LIGHTNING_DSMOE_IMPORTS", "")
    main()
    assert capsys.readouterr().out.startswith("imported\n")
    assert "" not in sys.path  # where a tool could take a file for an optional package of PyTorch's

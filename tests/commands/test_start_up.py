"""Tools that do not train start without what takes seconds to import."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.cli import TOOLS, TRAINING
from lightning_dsmoe.commands.train import DSMoECLI

SLOW = "{'lightning', 'matplotlib', 'scipy', 'torchmetrics', 'torch._dynamo', 'transformers'}"
CODES = {
    "tools": """
from lightning_dsmoe.cli import TOOLS, main
import importlib
for name in TOOLS:
    TOOLS[name]
""",
    "a_tool": """
import contextlib
from lightning_dsmoe.cli import main
with contextlib.suppress(SystemExit):
    main(["sweep", "--ckpt_path=absent.ckpt"])
""",
    "tokenizers": """
from lightning_dsmoe.data import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, Tokenizer
""",
    "functions": """
from lightning_dsmoe.metrics import active_parameters, count_parameters, expert_utilization
from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.inference import load_sparse
""",
}


def test_what_answers_without_pytorch() -> None:
    code = """
import contextlib
import sys
import lightning_dsmoe
from lightning_dsmoe.cli import main
for words in (["configs"], ["--help"], [], ["fot"], ["fit"]):
    with contextlib.suppress(SystemExit):
        main(words)
print("torch" in sys.modules)
"""
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.splitlines()[-1] == "False", run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("code", CODES)
def test_nothing_slow_is_imported(code: str) -> None:
    asked = f"{CODES[code]}\nimport sys\nprint(sorted({SLOW} & set(sys.modules)))"
    words = [sys.executable, "-c", asked]
    run = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.splitlines()[-1] == "[]", run.stdout + run.stderr


@pytest.mark.slow
def test_tools_measure_without_what_trains(measuring: Any, trained: Any) -> None:
    [files] = [word for word in measuring("report", "page.html") if word.startswith("--files=")]
    commands = [
        measuring("report", "page.html"),
        [*measuring("calibrate", "plan.json"), "--budget=0.5"],
        [*measuring("prune", "pruned"), f"--plan={trained.artifact}/plan.json"],
        ["certify", f"--artifact={trained.artifact}", "--renew=true", files],
        ["evaluate", f"--artifact={trained.artifact}", f"--text={files.partition('=')[2]}"],
    ]
    code = f"""
import sys
from lightning_dsmoe.cli import main
for words in {commands}:
    main(words)
print(sorted({{"lightning", "torchmetrics", "transformers"}} & set(sys.modules)))
"""
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.splitlines()[-1] == "[]", run.stdout + run.stderr


@pytest.mark.slow
def test_a_model_is_read_without_the_compiler(trained: Any) -> None:
    code = f"""
import sys
from lightning_dsmoe.inference import load_sparse
load_sparse({trained.artifact!r})
print("torch._dynamo" in sys.modules)
"""
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout == "False\n", run.stdout + run.stderr


def test_the_commands_that_train_are_those_of_lightning() -> None:
    assert set(TRAINING) == set(DSMoECLI.subcommands())
    assert not set(TRAINING) & set(TOOLS)


def test_names_that_are_imported_on_use() -> None:
    from lightning_dsmoe import cli, data, metrics
    from lightning_dsmoe.data.text import TextDataModule
    from lightning_dsmoe.metrics.active_parameters import ActiveParameters

    assert cli.DSMoECLI is DSMoECLI
    assert data.TextDataModule is TextDataModule
    assert metrics.ActiveParameters is ActiveParameters
    assert "ActiveParameters" in vars(metrics)  # not looked up a second time
    assert callable(metrics.expert_utilization)  # rather than the module of that name
    with pytest.raises(AttributeError, match=r"'lightning_dsmoe\.metrics' has no attribute 'Absen"):
        metrics.Absent  # noqa: B018

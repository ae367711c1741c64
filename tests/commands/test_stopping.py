"""Ctrl-C and SIGTERM end a command with one line: what is kept, and how to go on."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.analysis import evaluate_plan
from lightning_dsmoe.commands import console, sweep

# A process that a shell starts in the background ignores Ctrl-C, and so do those that it starts.
MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from lightning_dsmoe.cli import main
main()
"""
COMMAND = [sys.executable, "-c", MAIN]
WHOLE = "lightning-dsmoe: stopped by Ctrl-C; files are written whole or not at all"


def stop(*args: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "inside"),
    [
        ("calibrate", "lightning_dsmoe.commands.calibrate.search_plan"),
        ("prune", "lightning_dsmoe.commands.prune.used_experts"),
        ("report", "lightning_dsmoe.commands.report.utilization"),
        ("evaluate", "lightning_dsmoe.commands.evaluate.open_text_model"),
        ("generate", "lightning_dsmoe.commands.generate.load_decoder"),
        ("export", "lightning_dsmoe.commands.export.load_decoder"),
        ("import", "lightning_dsmoe.commands.import_.read_source"),
        ("certify", "lightning_dsmoe.commands.certify.judge"),
    ],
)
def test_tools(
    command: str, inside: str, cli: Any, trained: Any, measuring: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(inside, stop)
    words = {
        "evaluate": [command, f"--ckpt_path={trained.checkpoint}", f"--text={__file__}"],
        "generate": [command, f"--ckpt={trained.checkpoint}"],
        "export": [command, f"--ckpt_path={trained.checkpoint}"],
        "import": [command, "--from=absent"],
        "certify": [command, f"--artifact={trained.artifact}", "--renew=true"],
    }
    more = {"calibrate": ["--budget=0.5"], "prune": [f"--plan={trained.artifact}/plan.json"]}
    given = words.get(command) or [*measuring(command, "result"), *more.get(command, [])]
    outcome = cli(*given)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == WHOLE
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_a_sweep_says_what_is_kept_and_goes_on(
    cli: Any, measuring: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_measured = []

    def measure_two(*args: Any) -> Any:
        if len(n_measured) == 2:
            raise KeyboardInterrupt
        n_measured.append(None)
        return evaluate_plan(*args)

    monkeypatch.setattr(sweep, "evaluate_plan", measure_two)
    words = measuring("sweep", "sweep")
    outcome = cli(*words)
    results = tmp_path / "sweep" / "sweep.json"
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1].startswith("lightning-dsmoe: stopped by Ctrl-C; 2 of ")
    assert f"plans are in {results}, and the same command goes on" in outcome.err
    assert len(json.loads(results.read_text())["plans"]) == 2


def test_only_the_first_process_of_a_run_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in (("1", ""), ("0", f"{WHOLE}\n")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="130"):
            console.stop_quietly(KeyboardInterrupt())
        assert capsys.readouterr().err == lines


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_fit_says_the_command_that_goes_on_and_keeps_the_rows(
    sent: signal.Signals, code: int, config: Any, tiny: Any, tmp_path: Path
) -> None:
    options = [option for option in tiny(tmp_path) if "max_steps" not in option]
    words = [
        *("fit", "-c", config("quickstart.yaml"), *options),
        "--trainer.logger.init_args.version=0",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = tmp_path / "quickstart" / "version_0"
    with subprocess.Popen(
        [*COMMAND, *words, "--trainer.max_steps=1000000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as running:
        try:
            deadline = time.monotonic() + 120
            while not (run / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            running.send_signal(sent)
            _, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == code, err
    assert "Traceback" not in err
    *_, said = err.strip().splitlines()
    _, _, command = said.partition("to go on: lightning-dsmoe ")
    again = shlex.split(command)
    assert again[-1].startswith("--ckpt_path=")
    assert again[:-2] == words

    before = rows(run / "metrics.csv")
    assert before
    step = int(before[-1]["step"]) + 2
    resumed = subprocess.run(
        [*COMMAND, *again, f"--trainer.max_steps={step + 1}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert resumed.returncode == 0, resumed.stderr
    after = rows(run / "metrics.csv")
    assert [row["step"] for row in after[: len(before)]] == [row["step"] for row in before]
    assert len(after) > len(before)
    taken = [row["step"] for row in after if row["train/loss"]]
    assert taken == sorted({*taken}, key=int)  # each step once, although some were taken twice
    assert "will be deleted" not in resumed.stderr


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))

"""Runs that are killed or stopped at random, and resumed each time, end as undisturbed ones."""

import multiprocessing as mp
import os
import random
import signal
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from .amount import number

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of POSIX"),
]

STEPS = 60
OPTIONS = {
    "model": {"init_args": {"d_model": 16, "n_layers": 2, "dropout": 0.1}},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "accumulate_grad_batches": 2,
        "val_check_interval": 20,
        "limit_val_batches": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "save_last": True, "save_top_k": 2}
                | {"monitor": "step", "mode": "max"},
            },
            {
                "class_path": "lightning_dsmoe.callbacks.MIWeightAnnealing",
                "init_args": {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": STEPS},
            },
        ],
    },
}


def fit(words: Sequence[str]) -> None:
    """Train in this process, which has imported everything already."""
    from lightning_dsmoe.cli import main

    with open(os.devnull, "w") as silence:
        sys.stdout = sys.stderr = silence
        torch.set_num_threads(1)
        main(["fit", *words])


def words_of(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "text.txt").write_text("".join(f"def f{i}(x):\n    return {i}\n" for i in range(300)))
    (folder / "run.yaml").write_text(yaml.safe_dump(OPTIONS))
    return [
        "-c",
        str(files("lightning_dsmoe.cli_configs").joinpath("quickstart.yaml")),
        "-c",
        str(folder / "run.yaml"),
        f"--data.init_args.files={folder / 'text.txt'}",
        f"--data.init_args.cache_dir={folder}",
        "--data.init_args.context=16",
        "--data.init_args.batch_size=2",
        f"--trainer.logger.init_args.save_dir={folder}",
    ]


def start(words: list[str]) -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["lightning_dsmoe.commands.train", "lightning_dsmoe.cli"])
    process = context.Process(target=fit, args=(words,))
    process.start()
    return process


def resumed(words: list[str], folder: Path) -> list[str]:
    return [*words, "--ckpt_path=last"] if any(folder.rglob("*.ckpt")) else words


def end_of(folder: Path) -> tuple[Any, Any]:
    """Tensors and numbers of training in the newest checkpoint, which is of the last step."""
    newest = max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    found: dict[str, Any] = torch.load(newest, weights_only=True)
    assert found["global_step"] == STEPS
    [optimizer] = found["optimizer_states"]
    tensors = found["state_dict"], optimizer["state"]
    return tensors, (optimizer["param_groups"], found["lr_schedulers"])


@pytest.mark.parametrize(
    ("signals", "count"),
    [((signal.SIGKILL,), number(2, of=50)), ((signal.SIGTERM, signal.SIGINT), number(2, of=30))],
    ids=["killed", "stopped"],
)
def test_runs_end_as_if_undisturbed(
    signals: tuple[signal.Signals, ...], count: int, tmp_path: Path
) -> None:
    whole = start(words_of(tmp_path / "whole"))
    whole.join()
    assert whole.exitcode == 0
    expected = end_of(tmp_path / "whole")
    source = random.Random(1)
    done, run = 0, 0
    while done < count:
        folder = tmp_path / f"disturbed_{run}"
        words, run, is_finished = words_of(folder), run + 1, False
        while not is_finished:
            process = start(resumed(words, folder))
            if done < count:
                process.join(source.uniform(0.5, 4))
                if process.is_alive():
                    os.kill(process.pid, source.choice(signals))
                    done += 1
            process.join()
            is_finished = process.exitcode == 0
            assert process.exitcode in (0, 130, 143, *(-each for each in signals))
        tensors, numbers = end_of(folder)
        torch.testing.assert_close(tensors, expected[0], rtol=0, atol=0)
        assert numbers == expected[1]

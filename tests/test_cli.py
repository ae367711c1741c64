"""The command as its users start it."""

import os
import signal
import subprocess
import sys
import time
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from lightning_dsmoe.cli import main
from lightning_dsmoe.commands import train

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "lightning_dsmoe"]


def test_a_reader_that_leaves_early_ends_it_quietly() -> None:
    with subprocess.Popen(
        [*COMMAND, "configs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 141


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("what the model reads\n" * 200)
    words = [
        "-c",
        str(files("lightning_dsmoe.cli_configs").joinpath("quickstart.yaml")),
        f"--data.init_args.files={text}",
        f"--data.init_args.cache_dir={tmp_path}",
        "--data.init_args.context=16",
        "--model.init_args.d_model=16",
        "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=5",
        "--trainer.limit_val_batches=1",
        "--trainer.max_steps=1000000",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    running = subprocess.Popen(
        [*COMMAND, "fit", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    checkpoint = tmp_path / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running.poll() is None
        assert checkpoint.exists()
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 143
    assert "lightning-dsmoe: error:" not in err
    assert "Traceback" not in err

    saved = torch.load(checkpoint)
    step = saved["global_step"]
    assert saved["TextDataModule"]["batches"] > 0
    again = [f"--ckpt_path={checkpoint}", f"--trainer.max_steps={step + 1}"]
    monkeypatch.setattr(sys, "argv", ["lightning-dsmoe"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The dirpath has changed")
        main(["fit", *words, *again])
    resumed = tmp_path / "quickstart" / "version_1" / "checkpoints" / "last.ckpt"
    assert torch.load(resumed)["global_step"] == step + 1


def test_a_sharded_checkpoint_is_looked_into_however_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the folder of a sharded checkpoint"):
        train.look_into(str(tmp_path), weights_only=True)
    train.look_into("best", weights_only=True)

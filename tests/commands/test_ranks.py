"""`fit` on two processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.inference import load_sparse


def certified(artifact: Path | str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((Path(artifact) / "certificate.json").read_text())["data"]
    return data


@pytest.mark.ddp
@pytest.mark.slow
def test_the_quickstart_scales(trained: Any, tmp_path: Path) -> None:
    words = [
        *trained.words,
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
    ]
    command = [sys.executable, "-m", "lightning_dsmoe", "fit", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "quickstart" / "version_0"
    assert load_sparse(folder / "sparse").context_length == 16
    # Measured on the text that one process measures on, so that it can be checked anywhere.
    assert certified(folder / "sparse") == certified(trained.artifact)
    for place in ("checkpoints/last.ckpt", "utilization/last.png", "config.yaml"):
        assert (folder / place).is_file()

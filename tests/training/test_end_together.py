"""Two processes of which one fails, is told to stop, or is killed."""

import os
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from lightning_dsmoe.training.end_together import is_follow_up, plainly

FAILING = """
import os
from pathlib import Path
from lightning import Callback

class Failing(Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            raise ValueError(f"broken on rank {self.rank}")

    def on_train_batch_end(self, trainer, *_):
        Path(f"{trainer.global_rank}.pid").write_text(str(os.getpid()))
"""


def start(folder: Path, failing: int) -> subprocess.Popen[str]:
    (folder / "failing.py").write_text(FAILING)
    (folder / "text.txt").write_text("what the model reads\n" * 200)
    words = [
        "-c",
        str(files("lightning_dsmoe.cli_configs").joinpath("quickstart.yaml")),
        "--data.init_args.files=text.txt",
        "--data.init_args.cache_dir=.",
        "--data.init_args.context=16",
        "--data.init_args.batch_size=2",
        "--model.init_args.d_model=16",
        "--trainer.max_steps=1000000",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--import=failing",
        "--trainer.callbacks+=failing.Failing",
        f"--trainer.callbacks.init_args.rank={failing}",
    ]
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_dsmoe", "fit", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def pid_of(rank: int, folder: Path, running: subprocess.Popen[str]) -> int:
    """The process of a rank, once it trains."""
    path = folder / f"{rank}.pid"
    deadline = time.monotonic() + 200
    while not (path.exists() and path.read_text()):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return int(path.read_text())


def ends(pid: int) -> bool:
    """Whether a process ends within 30 s."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(300):
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("case", ["an error", "SIGTERM", "SIGKILL"])
def test_what_ends_one_rank_ends_both(case: str, tmp_path: Path) -> None:
    running = start(tmp_path, failing=1 if case == "an error" else -1)
    try:
        pid = pid_of(1, tmp_path, running)
        if case != "an error":
            os.kill(pid, getattr(signal, case))
        _, err = running.communicate(timeout=90)
    finally:
        running.kill()
    assert ends(pid)
    assert "Traceback" not in err
    assert "frame #" not in err
    errors = [line for line in err.splitlines() if line.startswith("lightning-dsmoe: error:")]
    if case == "an error":
        [only] = errors
        assert "broken on rank 1, raised in failing.py, line 12" in only
        assert running.returncode != 0
    elif case == "SIGKILL":  # the observer of the processes may be faster than the one that is left
        assert all("another process of this run has ended" in line for line in errors[:1])
        assert len(errors) <= 1
        assert running.returncode != 0
    else:
        assert errors == []
        assert running.returncode == 143
        [checkpoint] = tmp_path.rglob("last.ckpt")
        assert len(torch.load(checkpoint)["random_state"]) == 2


def test_messages_have_no_frames() -> None:
    said = "[/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:1"
    expected = f"another process of this run has ended ({said})"
    assert plainly(f"{said}\nException raised from f at a.cc:1\nframe #0: g") == expected
    assert plainly("logger: Connection reset by peer") == "logger: Connection reset by peer"
    assert plainly("no such file") == "no such file"


def test_only_what_was_noted_follows_from_another_error() -> None:
    error = RuntimeError("mine")
    assert not is_follow_up(error)
    error.add_note("another process of this run failed first")
    assert is_follow_up(error)

"""Two processes of which one fails, is told to stop, or is killed."""

import os
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dsmoe.torch_private import default_store
from lightning_dsmoe.training import end_together
from lightning_dsmoe.training.end_together import EndTogether, is_follow_up, plainly

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


@pytest.fixture
def of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Trainer that takes a group of one process for one of two."""
    monkeypatch.setattr(end_together, "GRACE", 0.2)
    monkeypatch.setattr(end_together, "_POLL", 0.05)
    rendezvous = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield SimpleNamespace(world_size=2, global_rank=0, checkpoint_callbacks=[], strategy=None)
    monkeypatch.undo()
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_run_after_one_that_failed_is_not_ended(
    of_two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same process, where the store of a group may still be in use."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    module: Any = torch.nn.Module()
    first, second = EndTogether(), EndTogether()
    error = ValueError("of the first run")
    first.setup(of_two, module, "fit")
    first.on_exception(of_two, module, error)
    assert not is_follow_up(error)
    second.setup(of_two, module, "fit")
    time.sleep(2 * end_together.GRACE)
    assert ended == []
    default_store().set(second._failed, "rank 1")
    deadline = time.monotonic() + 30
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    second.teardown(of_two, module, "fit")
    assert set(ended) == {1}


def test_a_rank_without_a_handler_takes_part_where_another_is_to_be_queued_again(
    of_two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where `fit` runs outside of the main thread, in which signals are handled."""
    called: list[int] = []
    of_two._signal_connector = SimpleNamespace(
        _slurm_sigusr_handler_fn=lambda number, frame: called.append(number)
    )
    monkeypatch.setattr(dist, "all_reduce", lambda noted, **_: noted.fill_(signal.SIGUSR1))
    EndTogether().on_train_batch_end(of_two, torch.nn.Module())  # type: ignore[arg-type]
    assert called == [signal.SIGUSR1]


def test_a_second_signal_does_not_cut_what_is_saved_after_the_first(
    of_two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(dist, "all_reduce", lambda noted, **_: noted.fill_(signal.SIGTERM))
    module: Any = torch.nn.Module()
    together = EndTogether()
    together.setup(of_two, module, "fit")

    def save(*_: Any) -> None:
        together._note(signal.SIGTERM, None)
        time.sleep(3 * end_together.GRACE)

    of_two.checkpoint_callbacks = [SimpleNamespace(on_exception=save)]
    with pytest.raises(SIGTERMException) as stop:
        together.on_train_batch_end(of_two, module)
    assert ended == []
    together.on_exception(of_two, module, stop.value)


def test_sharded_weights_are_not_saved_after_a_failure(of_two: Any) -> None:
    """That would need the others, and its error would be shown in place of the first."""
    saving = ModelCheckpoint(save_on_exception=True)
    of_two.checkpoint_callbacks = [saving]
    of_two.strategy = ModelParallelStrategy()
    together, error = EndTogether(), ValueError("the first")
    together.on_exception(of_two, torch.nn.Module(), error)  # type: ignore[arg-type]
    assert together.error is error
    assert not saving.save_on_exception
    assert not dist.is_initialized()

"""A run on two processes goes on in one, and the other way round."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from lightning_dsmoe.data import TextDataModule

from .test_resume import Recorder, SaveAfterEveryBatch, trainer

STEPS, SAVED = 8, 3
Rows = list[list[int]]


def run(folder: Path, batch_size: int, ckpt_path: Path | None = None, **options: Any) -> list[Rows]:
    """What this process reads at each step."""
    data = TextDataModule(
        str(folder / "text.txt"),
        context=8,
        batch_size=batch_size,
        cache_dir=str(folder / "cache"),
    )
    model = Recorder()
    steps = {"max_steps": STEPS, "limit_val_batches": 0}
    trainer(folder, **steps, **options).fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return [batch.tolist() for batch in model.seen]


def run_rank(rank: int, folder: Path, port: int) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ.update(address)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    (folder / "two").mkdir(exist_ok=True)
    one = folder / "one" / f"{SAVED}.ckpt"
    found = {
        "straight": run(folder, 2, callbacks=[SaveAfterEveryBatch(folder / "two")], **two),
        "as many": run(folder, 2, one, **two),
        "half": run(folder, 1, one, **two),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:windows of a step",
    "ignore:You defined a `validation_step` but have no:UserWarning",
    "ignore:the checkpoint holds the random states",
)
def test_two_processes_and_one_take_over_from_each_other(tmp_path: Path) -> None:
    text = "".join(chr(33 + (7 * i * i + 3 * i + i // 90) % 90) for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "one").mkdir()
    straight = run(tmp_path, 4, callbacks=[SaveAfterEveryBatch(tmp_path / "one")])
    mp.start_processes(
        run_rank, (tmp_path, find_free_network_port()), nprocs=2, start_method="spawn"
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    def together(name: str) -> list[Rows]:
        steps = zip(*(rank[name] for rank in ranks), strict=True)
        return [sorted(first + second) for first, second in steps]

    expected = [sorted(step) for step in straight]
    assert together("straight") == expected
    assert together("as many") == expected[SAVED:]
    half = together("half")
    assert len(half) == STEPS - SAVED
    # The first epoch has two steps of four more, then the next one begins.
    pairs = [sorted(first + second) for first, second in zip(half[::2], half[1::2], strict=False)]
    assert pairs == expected[SAVED : SAVED + 2]
    two = tmp_path / "two" / f"{SAVED}.ckpt"
    assert [sorted(step) for step in run(tmp_path, 4, two)] == expected[SAVED:]

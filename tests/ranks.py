"""Two processes on this machine, joined by gloo."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(run: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a function of a test module returns on each of two ranks."""
    # One process imports what takes seconds, and the ranks are forked from it.
    mp.set_forkserver_preload(["lightning_dsmoe", "torch.testing"])
    mp.start_processes(_run_rank, (run, str(folder)), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _run_rank(rank: int, run: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["ROOT_OF_RUNS"] = folder  # a forked server keeps the environment of its start
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    torch.save(run(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()

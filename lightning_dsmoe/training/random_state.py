"""The random number generators of each process, saved with a checkpoint."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_dsmoe.data.loader import unfinished_batches

_MERSENNE_TWISTER = "MT19937"
_SEEDS = 2**32
_WORDS = 624
"""Numbers in the state of a Mersenne Twister."""


class ResumableRandomState:
    """The random numbers of a run, which a resumed run continues on every rank.

    Lightning's checkpoints hold no random states: without these, dropout and whatever else draws
    numbers would differ from the uninterrupted run after every resumption.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop what an earlier run has left."""
        self._restored: dict[str, Any] | None = None
        self._at_batch_start: dict[str, Any] | None = None

    def load(self, checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
        """Read this rank's state; where other ranks saved theirs, derive one, and say so.

        Of another number of processes each begins anew, with a seed that the state of the first
        one draws, plus its own rank: the same in every resumption, and unlike those of the start.
        Of another number of GPUs, theirs are left as they are, which is said too.

        The first batch restores it, not earlier, since what runs until then draws numbers too:
        workers of loaders, a sanity check, other callbacks.
        """
        saved = checkpoint.get("random_state")
        given = saved if isinstance(saved, list) else [saved]  # a single one in older files
        states = [state for state in given if state is not None]
        for state in states:
            check_random_state(state)
        if len(states) == trainer.world_size:
            self._restored = states[trainer.global_rank]
            _tell_of_devices(states[0], trainer)
            return
        if states:
            self._restored = derived_state(states[0], trainer.global_rank)
        rank_zero_warn(
            f"the checkpoint holds the random states of {len(states)} processes and this run has "
            f"{trainer.world_size}: random numbers, as of dropout, "
            + ("are seeded anew on each" if states else "start anew from the seed")
        )

    def begin_batch(self) -> None:
        """Restore what was loaded, once, and note the state that this batch begins with."""
        if self._restored is not None:
            restore_random_state(self._restored)
            self._restored = None
        self._at_batch_start = random_state()

    def end_batch(self) -> None:
        """Drop the state that a batch began with: the next one may fail before it is noted."""
        self._at_batch_start = None

    def of_all_ranks(self, trainer: Trainer) -> list[dict[str, Any] | None] | None:
        """The state of each rank from which training continues.

        In the middle of a batch that is the state of its beginning, since a resumed run repeats it.
        None after an exception or in the middle of a batch on several ranks: others may not be
        saving, and waiting for them would lose the checkpoint.
        """
        unfinished = unfinished_batches(trainer)
        mine = (self._at_batch_start if unfinished else None) or random_state()
        if self._restored is not None:
            mine = self._restored
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return [mine]
        if unfinished or trainer.interrupted:
            return None
        states: list[dict[str, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(states, mine)
        return states


def _tell_of_devices(state: dict[str, Any], trainer: Trainer) -> None:
    kept, there = len(state["cuda"]), torch.cuda.device_count()
    if trainer.strategy.root_device.type == "cuda" and kept != there:
        rank_zero_warn(
            f"the checkpoint holds the random states of {kept} GPUs and {there} are visible here: "
            "random numbers of GPUs, as of dropout, start anew from the seed"
        )


def random_state() -> dict[str, Any]:
    """The state of the generators of Python, NumPy and PyTorch, on the CPU and on CUDA if in use.

    It is data that `torch.load` reads with `weights_only=True`, so NumPy's key is a tensor. NumPy's
    state is None where another kind of generator was put into its place.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    numpy = None
    if numpy_state["bit_generator"] == _MERSENNE_TWISTER:
        key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
        numpy = (key, numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"])
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": numpy}


def derived_state(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """The state of generators that are seeded with a number drawn from another state, plus a rank.

    Args:
        state: what `random_state` gave.
        rank: number of a process.
    """
    generator = torch.Generator()
    generator.set_state(state["cpu"].cpu())
    seed = (int(torch.randint(_SEEDS, (), generator=generator)) + rank) % _SEEDS
    with isolate_rng(torch.cuda.is_initialized()):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return random_state()


def check_random_state(state: Any) -> None:
    """Raise a ValueError if a file's state is not one; those of Python and NumPy may be absent."""
    try:
        torch.Generator().set_state(state["cpu"].cpu())
        if not all(each.dtype == torch.uint8 and each.ndim == 1 for each in state["cuda"]):
            raise ValueError("cuda")
        if (python := state.get("python")) is not None:
            random.Random().setstate(python)
            if not isinstance(python[2], float | None):
                raise ValueError("python")
        if (numpy := state.get("numpy")) is not None:
            np.random.RandomState().set_state(_numpy_state(numpy))
            if not 0 <= numpy[1] <= _WORDS:  # NumPy would read beyond its memory
                raise ValueError("numpy")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"the checkpoint's random_state is not one: {reason:.200}") from None


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what `random_state` gave; others stay as they are."""
    torch.set_rng_state(state["cpu"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count() and state["cuda"]:
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
    if state.get("python") is not None:
        random.setstate(state["python"])
    if state.get("numpy") is not None:
        np.random.set_state(_numpy_state(state["numpy"]))


def _numpy_state(state: Any) -> tuple[Any, ...]:
    key, position, has_gauss, gauss = state
    if key.shape != (_WORDS,):  # before it takes memory
        raise ValueError("numpy")
    return (_MERSENNE_TWISTER, key.cpu().numpy().astype(np.uint32), position, has_gauss, gauss)

"""The random number generators of a process, kept with a checkpoint."""

import random
from typing import Any

import numpy as np
import torch

_MERSENNE_TWISTER = "MT19937"
_WORDS = 624
"""Numbers in the state of a Mersenne Twister."""


def random_state() -> dict[str, Any]:
    """The state of the generators of Python, NumPy and PyTorch, on the CPU and on CUDA if in use.

    It is data that `torch.load` takes with `weights_only=True`. NumPy's is None where another kind
    of generator was put into its place.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    found: dict[str, Any] = np.random.get_state(legacy=False)
    numpy = None
    if found["bit_generator"] == _MERSENNE_TWISTER:
        key = torch.from_numpy(found["state"]["key"].astype(np.int64))
        numpy = (key, found["state"]["pos"], found["has_gauss"], found["gauss"])
    return {
        "cpu": torch.get_rng_state(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": numpy,
    }


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

"""The random number generators of PyTorch, kept with a checkpoint."""

from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """The state of PyTorch's generators on the CPU and on every CUDA device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Set PyTorch's generators to what `random_state` gave; other devices stay as they are."""
    torch.set_rng_state(state["cpu"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count() and state["cuda"]:
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])

"""Decoders from training checkpoints, without running anything that the file names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.architecture import build_decoder

_PREFIX = "decoder."


class LoadedDecoder(NamedTuple):
    """A decoder in evaluation mode, and what the checkpoint says of its data.

    `tokenizer` describes the tokenizer, `context` is the length of the training windows; both are
    None if the checkpoint does not know.
    """

    decoder: Decoder
    tokenizer: dict[str, Any] | None
    context: int | None


def load_decoder(path: str | Path) -> LoadedDecoder:
    """Load the decoder of a checkpoint written by `DSMoELanguageModel`, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, holds more than data, or is another model's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is not a complete, data-only checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict) or not {"architecture", "state_dict"} <= set(checkpoint):
        raise ValueError(f"{path} is not a checkpoint of DSMoELanguageModel")
    decoder = build_decoder(checkpoint["architecture"])
    state = {
        name.removeprefix(_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    check_state(decoder.state_dict(), state)
    decoder.load_state_dict(state, assign=True)
    if decoder.tie_embeddings:
        decoder.head.weight = decoder.embedding.weight
    return LoadedDecoder(decoder, checkpoint.get("tokenizer"), checkpoint.get("context"))


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise one ValueError that lists every tensor that is missing, extra or of another shape."""
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"unknown {name}" for name in found if name not in expected]
    faults += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if faults:
        raise ValueError(f"the weights are another model's: {'; '.join(faults)}")

"""The tensors of a directory, matched with the decoder that its configuration describes."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.hugging_face.own_model import OwnModel, own_entries
from lightning_dsmoe.hugging_face.source_model import SourceModel
from lightning_dsmoe.hugging_face.weight_map import Entry, entries
from lightning_dsmoe.serialization.tensor_files import StoredTensor, listed

_MOST_MISSING = 4
"""By how much a configuration may ask for more weights than there are, to be told which ones."""
_PART = re.compile(r"(.+)\[(\d)/(\d)\]")
_NOT_WEIGHTS = re.compile(r".*(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")
"""Constants that older versions saved."""


def check_size(source: SourceModel | OwnModel, stored: dict[str, StoredTensor]) -> None:
    """Refuse a small file whose configuration would take minutes to list all that is missing."""
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if source.n_weights_at_least > _MOST_MISSING * held:
        raise ValueError(
            f"the configuration is of another model: it asks for {source.n_weights_at_least:,} "
            f"weights or more, and the files hold {held:,}"
        )


def matched(
    source: SourceModel | OwnModel, decoder: Decoder, stored: dict[str, StoredTensor]
) -> list[Entry]:
    """The entries of the layout that a directory has, with names as they are on disk.

    Raises:
        ValueError: listing all tensors that are missing, unknown, or of another shape or kind.
    """
    is_own = isinstance(source, OwnModel)
    wanted = own_entries(decoder) if is_own else entries(source.family, decoder)
    found, problems = _compared(wanted, source.family, decoder, stored)
    if problems and not is_own:
        stacked = entries(source.family, decoder, "stacked")
        both, others = _compared(stacked, source.family, decoder, stored)
        if len(others) < len(problems):
            found, problems = both, others
    if problems:
        raise ValueError(
            f"the tensors do not match the configuration of this {source.family}: "
            f"{listed(problems)}"
        )
    return found


def _compared(
    found: list[Entry], family: str, decoder: Decoder, stored: dict[str, StoredTensor]
) -> tuple[list[Entry], list[str]]:
    if family == "gpt2" and not any(name.startswith("transformer.") for name in stored):
        # As the first checkpoints of GPT-2 were saved, without the head.
        found = [
            entry._replace(theirs=tuple(n.removeprefix("transformer.") for n in entry.theirs))
            for entry in found
        ]
    ours = decoder.state_dict()
    problems, known = [], set()
    for entry in found:
        shapes = [tuple(each.shape) for each in entry.to_theirs(ours[entry.ours])]
        for name, shape in zip(entry.theirs, shapes, strict=True):
            name, parts = _whole(name)
            shape = (*shape[:-1], shape[-1] * parts)
            known.add(name)
            if name not in stored:
                problems.append(f"missing {name}")
            elif stored[name].shape != shape:
                problems.append(f"{name} is {stored[name].shape}, not {shape}")
            elif not stored[name].dtype.is_floating_point:
                problems.append(f"{name} is {stored[name].dtype}, not a floating-point type")
    problems += [
        f"unknown {name}"
        for name in stored
        if name not in known and not _NOT_WEIGHTS.fullmatch(name) and not _is_tied(name, decoder)
    ]
    return found, list(dict.fromkeys(problems))


def _is_tied(name: str, decoder: Decoder) -> bool:
    """Whether a tensor repeats the embeddings, as older versions saved it."""
    return decoder.tie_embeddings and name == "lm_head.weight"


def check_tied_head(decoder: Decoder, stored: dict[str, StoredTensor]) -> None:
    """Raise a ValueError if a stored head is not the embeddings that it shares."""
    head = stored.get("lm_head.weight")
    if head is not None and not torch.equal(
        head.read().to(decoder.head.weight), decoder.head.weight
    ):
        raise ValueError(
            "lm_head.weight differs from the embeddings, although tie_word_embeddings is true"
        )


def _whole(name: str) -> tuple[str, int]:
    """Name of a tensor on disk, and of how many parts the named one is one."""
    part = _PART.fullmatch(name)
    return (name, 1) if part is None else (part[1], int(part[3]))


def files_of(entry: Entry) -> list[str]:
    """Names of the tensors on disk that an entry is made of."""
    return list(dict.fromkeys(_whole(name)[0] for name in entry.theirs))


def _read(name: str, stored: dict[str, StoredTensor]) -> Tensor:
    part = _PART.fullmatch(name)
    if part is None:
        return stored[name].read()
    return stored[part[1]].read().chunk(int(part[3]), dim=-1)[int(part[2])]


class StoredParts(Sequence[Tensor]):
    """The tensors of an entry, each read when it is asked for."""

    def __init__(
        self, names: Sequence[str], stored: dict[str, StoredTensor], dtype: torch.dtype
    ) -> None:
        self.names, self.stored, self.dtype = names, stored, dtype

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: Any) -> Any:
        return _read(self.names[number], self.stored).to(self.dtype)


def common_dtype(tensors: Sequence[StoredTensor]) -> torch.dtype:
    """The type that holds all values exactly, so that a model has one type."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype

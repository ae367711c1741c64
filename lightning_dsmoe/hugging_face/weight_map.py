"""The weight map between a decoder and a family of models of transformers."""

from collections.abc import Callable
from typing import NamedTuple

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.families import (
    gpt2,
    granitemoe,
    jetmoe,
    llama,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from lightning_dsmoe.hugging_face.source_model import SourceModel
from lightning_dsmoe.hugging_face.weight_entries import Entry as Entry
from lightning_dsmoe.hugging_face.weight_entries import Layout as Layout


class Family(NamedTuple):
    """What its configuration means, and where its tensors go."""

    read: Callable[[ConfigFile], SourceModel]
    entries: Callable[[Decoder, Layout], list[Entry]]


FAMILIES = {
    "llama": Family(llama.read, llama.entries),
    "mistral": Family(llama.read_mistral, llama.entries),
    "qwen2": Family(llama.read_qwen2, llama.entries),
    "qwen3": Family(llama.read_qwen3, llama.entries),
    "gpt2": Family(gpt2.read, gpt2.entries),
    "olmoe": Family(olmoe.read, olmoe.entries),
    "qwen2_moe": Family(qwen2_moe.read, qwen2_moe.entries),
    "qwen3_moe": Family(qwen3_moe.read, qwen3_moe.entries),
    "mixtral": Family(mixtral.read, mixtral.entries),
    "granitemoe": Family(granitemoe.read, granitemoe.entries),
    "granitemoeshared": Family(granitemoe.read_shared, granitemoe.entries),
    "jetmoe": Family(jetmoe.read, jetmoe.entries),
}
"""By the `model_type` of transformers."""


def entries(family: str, decoder: Decoder, layout: Layout = "original") -> list[Entry]:
    """The entries of all tensors of a decoder, in its order.

    Args:
        family: `model_type` of transformers, such as qwen3_moe.
        decoder: for its sizes; it may be on the meta device.
        layout: "original" is what `save_pretrained` writes, "stacked" with
            `save_original_format=False`.

    Raises:
        ValueError: if the family is not known.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r:.80}")
    return FAMILIES[family].entries(decoder, layout)

"""Mixtral: grouped-query attention, and SwiGLU experts with renormalised gates."""

from functools import partial

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForwardLayer, MixtureOfExperts
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.families import llama_fields as fields
from lightning_dsmoe.hugging_face.families.naming import experts_of, llama_entries, mixture
from lightning_dsmoe.hugging_face.source_model import SourceModel
from lightning_dsmoe.hugging_face.weight_entries import Entry, Layout, same


def read(config: ConfigFile) -> SourceModel:
    """The architecture of a MixtralForCausalLM."""
    fields.check_window(config, default=None, positions=131072)
    return SourceModel(
        **fields.llama_fields(config, eps=1e-5, theta=1e6, positions=131072),
        mixture=fields.read_mixture(config, "intermediate_size", renormalize=True),
    )


def entries(decoder: Decoder, layout: Layout) -> list[Entry]:
    """The weight map of MixtralForCausalLM."""
    if layout == "stacked":  # under the names of the other families
        return llama_entries(decoder, partial(mixture, layout=layout))
    return llama_entries(decoder, _feed_forward)


def _feed_forward(layer: FeedForwardLayer, ours: str, theirs: str) -> list[Entry]:
    if not isinstance(layer, MixtureOfExperts):
        raise ValueError("every layer of Mixtral is a mixture of experts")
    theirs = f"{theirs}block_sparse_moe."
    experts = experts_of(layer, ours, f"{theirs}experts.", "original", ("w1", "w3", "w2"))
    return [same(f"{theirs}gate.weight", f"{ours}router.weight"), *experts]

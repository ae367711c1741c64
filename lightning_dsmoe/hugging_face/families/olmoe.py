"""OLMoE: a norm over all queries and one over all keys, and SwiGLU experts."""

from functools import partial

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.families import llama_fields as fields
from lightning_dsmoe.hugging_face.families.naming import llama_entries, mixture
from lightning_dsmoe.hugging_face.source_model import SourceModel
from lightning_dsmoe.hugging_face.weight_entries import Entry, Layout


def read(config: ConfigFile) -> SourceModel:
    """The architecture of an OlmoeForCausalLM."""
    config.refuse_unless("clip_qkv", (), "null, queries, keys and values that are not clipped")
    return SourceModel(
        **fields.llama_fields(config, eps=1e-5, positions=4096),
        **fields.all_biases(config),
        qk_norm="projection",
        mixture=fields.read_mixture(config, "intermediate_size"),
    )


def entries(decoder: Decoder, layout: Layout) -> list[Entry]:
    """The weight map of OlmoeForCausalLM."""
    return llama_entries(decoder, partial(mixture, layout=layout))

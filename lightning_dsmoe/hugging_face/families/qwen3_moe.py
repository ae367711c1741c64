"""Qwen3-MoE: grouped-query attention with a norm over each head, and SwiGLU experts."""

from functools import partial

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.families import llama_fields as fields
from lightning_dsmoe.hugging_face.families.naming import llama_entries, mixture
from lightning_dsmoe.hugging_face.source_model import SourceModel
from lightning_dsmoe.hugging_face.weight_entries import Entry, Layout


def read(config: ConfigFile) -> SourceModel:
    """The architecture of a Qwen3MoeForCausalLM."""
    fields.check_window(config, default=4096, positions=32768, switch="use_sliding_window")
    dense_layers = fields.qwen_dense_layers(config)
    return SourceModel(
        **fields.llama_fields(config, positions=32768),
        **fields.all_biases(config),
        qk_norm=True,
        mixture=fields.read_mixture(config, "moe_intermediate_size", dense_layers=dense_layers),
    )


def entries(decoder: Decoder, layout: Layout) -> list[Entry]:
    """The weight map of Qwen3MoeForCausalLM."""
    return llama_entries(decoder, partial(mixture, layout=layout))

"""Llama and its likes, which are dense: SmolLM, Mistral, Qwen2 and Qwen3."""

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.families import llama_fields as fields
from lightning_dsmoe.hugging_face.families.naming import llama_entries, swiglu
from lightning_dsmoe.hugging_face.source_model import SourceModel
from lightning_dsmoe.hugging_face.weight_entries import Entry, Layout


def read(config: ConfigFile) -> SourceModel:
    """The architecture of a LlamaForCausalLM."""
    return SourceModel(
        **fields.llama_fields(config),
        **fields.all_biases(config),
        expert_bias=config.flag("mlp_bias", False),
    )


def read_mistral(config: ConfigFile) -> SourceModel:
    """The architecture of a MistralForCausalLM."""
    fields.check_window(config, default=4096, positions=131072)
    return SourceModel(**fields.llama_fields(config, positions=131072))


def read_qwen2(config: ConfigFile) -> SourceModel:
    """The architecture of a Qwen2ForCausalLM."""
    _check_qwen_window(config)
    return SourceModel(**fields.llama_fields(config, positions=32768), bias=True)


def read_qwen3(config: ConfigFile) -> SourceModel:
    """The architecture of a Qwen3ForCausalLM."""
    _check_qwen_window(config)
    config.fields.setdefault("head_dim", 128)
    return SourceModel(
        **fields.llama_fields(config, positions=32768), **fields.all_biases(config), qk_norm=True
    )


def _check_qwen_window(config: ConfigFile) -> None:
    switch = "use_sliding_window"
    fields.check_window(config, default=4096, positions=32768, switch=switch, by_layer=True)


def entries(decoder: Decoder, layout: Layout) -> list[Entry]:
    """The weight map of all of them; routers are ours alone."""
    del layout
    return llama_entries(decoder, swiglu)

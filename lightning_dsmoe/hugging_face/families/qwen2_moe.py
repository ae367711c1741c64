"""Qwen2-MoE: SwiGLU experts, and one that always runs under a gate of its own."""

from functools import partial

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForwardLayer, MixtureOfExperts
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.families import llama_fields as fields
from lightning_dsmoe.hugging_face.families.naming import llama_entries, mixture
from lightning_dsmoe.hugging_face.source_model import SourceModel
from lightning_dsmoe.hugging_face.weight_entries import Entry, Layout, dense_glu, same


def read(config: ConfigFile) -> SourceModel:
    """The architecture of a Qwen2MoeForCausalLM."""
    switch = "use_sliding_window"
    fields.check_window(config, default=4096, positions=32768, switch=switch, by_layer=True)
    return SourceModel(
        **fields.llama_fields(config, positions=32768),
        bias=config.flag("qkv_bias", True),
        mixture=fields.read_mixture(
            config,
            "moe_intermediate_size",
            d_shared=config.size("shared_expert_intermediate_size"),
            shared_gate=True,
            dense_layers=fields.qwen_dense_layers(config),
        ),
    )


def entries(decoder: Decoder, layout: Layout) -> list[Entry]:
    """The weight map of Qwen2MoeForCausalLM, without a shared expert if ours has none."""
    return llama_entries(decoder, partial(_feed_forward, layout=layout))


def _feed_forward(layer: FeedForwardLayer, ours: str, theirs: str, layout: Layout) -> list[Entry]:
    found = mixture(layer, ours, theirs, layout)
    if not isinstance(layer, MixtureOfExperts):
        return found
    if layer.shared is not None:
        name = f"{theirs}mlp.shared_expert."
        parts = f"{name}gate_proj.", f"{name}up_proj.", f"{name}down_proj."
        found += dense_glu(*parts, f"{ours}shared.experts.", n_experts=1)
    if layer.shared_gate is not None:
        found.append(same(f"{theirs}mlp.shared_expert_gate.weight", f"{ours}shared_gate.weight"))
    return found

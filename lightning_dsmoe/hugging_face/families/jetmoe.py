"""JetMoe: a mixture of attention heads and a mixture of SwiGLU experts, both renormalised."""

from typing import cast

from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.families import llama_fields as fields
from lightning_dsmoe.hugging_face.families.naming import around_blocks, blocks_of, norm
from lightning_dsmoe.hugging_face.source_model import SourceModel
from lightning_dsmoe.hugging_face.weight_entries import (
    Entry,
    Layout,
    same,
    stacked_glu_experts,
    transposed,
)

_BLOCK_EPS = 1e-6
"""Of the norms in blocks; the configuration's is that of the last norm."""


def read(config: ConfigFile) -> SourceModel:
    """The architecture of a JetMoeForCausalLM."""
    config.refuse_unless("rms_norm_eps", (_BLOCK_EPS,), "1e-6, which its blocks have in any case")
    mixture = fields.read_mixture(config, "intermediate_size", renormalize=True, attention=True)
    n_kv_heads = config.size("num_key_value_heads")
    # Its heads are counted per token: those of the experts that run.
    config.fields["num_attention_heads"] = n_kv_heads * mixture.k
    config.fields["head_dim"] = config.size("kv_channels")
    return SourceModel(
        **fields.llama_fields(config, tied=True, positions=4096, activation="activation_function"),
        output_bias=True,
        expert_bias=True,
        mixture=mixture,
    )


def entries(decoder: Decoder, layout: Layout) -> list[Entry]:
    """The weight map of JetMoeForCausalLM, which has one layout only.

    Its experts have an output bias, and no other: where ours have both, the input's is no entry.
    """
    del layout
    found = around_blocks(decoder)
    for number, block in enumerate(blocks_of(decoder)):
        ours, theirs = f"blocks.{number}.", f"model.layers.{number}."
        heads, experts = f"{ours}attention.heads.", f"{theirs}self_attention.experts."
        found += norm(block.attention_norm, f"{theirs}input_layernorm", f"{ours}attention_norm")
        found += [
            same(f"{experts}input_linear.weight", f"{heads}w_q.weight"),
            transposed(f"{experts}output_linear.weight", f"{heads}w_o.weight"),
            same(f"{experts}router.layer.weight", f"{ours}attention.router.weight"),
            same(f"{theirs}self_attention.kv_proj.weight", f"{heads}kv.weight"),
        ]
        if cast(HeadGroups, block.attention.heads).b_o is not None:
            found.append(same(f"{experts}bias", f"{heads}b_o"))
        found += norm(
            block.feed_forward_norm,
            f"{theirs}post_attention_layernorm",
            f"{ours}feed_forward_norm",
        )
        ours, theirs = f"{ours}feed_forward.", f"{theirs}mlp."
        found += [
            same(f"{theirs}router.layer.weight", f"{ours}router.weight"),
            *stacked_glu_experts(
                f"{theirs}input_linear.weight", f"{theirs}output_linear.weight", f"{ours}experts."
            ),
        ]
        if cast(Experts, block.feed_forward.experts).b_out is not None:
            found.append(same(f"{theirs}bias", f"{ours}experts.b_out"))
    return found

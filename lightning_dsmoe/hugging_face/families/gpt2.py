"""GPT-2: learned positions, layer norms, and projections that are stored transposed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.families.naming import blocks_of, norm
from lightning_dsmoe.hugging_face.source_model import SourceModel
from lightning_dsmoe.hugging_face.weight_entries import Entry, Layout, rearranged, same
from lightning_dsmoe.reading import MAX_LAYERS


def read(config: ConfigFile) -> SourceModel:
    """The architecture of a GPT2LMHeadModel."""
    config.refuse_unless("scale_attn_weights", (True,), "true")
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        config.refuse_unless(name, (False,), "false")
    d_model, n_heads = config.size("n_embd"), config.size("n_head")
    if d_model % n_heads:
        config.refuse("n_head", f"a divisor of n_embd={d_model}")
    return SourceModel(
        family="gpt2",
        vocab_size=config.size("vocab_size"),
        d_model=d_model,
        n_layers=config.size("n_layer", most=MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=max(1, d_model // n_heads),
        d_hidden=config.size("n_inner", default=4 * d_model),
        max_positions=config.size("n_positions", default=1024),
        norm_eps=config.number("layer_norm_epsilon", 1e-5, least=0),
        tie_embeddings=config.flag("tie_word_embeddings", True),
        activation=config.activation("activation_function", "gelu_new"),
        rope=None,
        bias=True,
        output_bias=True,
        expert_bias=True,
        glu=False,
    )


def entries(decoder: Decoder, layout: Layout) -> list[Entry]:
    """The weight map of GPT2LMHeadModel; routers are ours alone."""
    del layout
    found = [
        same("transformer.wte.weight", "embedding.weight"),
        same("transformer.wpe.weight", "positions.weight"),
    ]
    for number, block in enumerate(blocks_of(decoder)):
        ours, theirs = f"blocks.{number}.", f"transformer.h.{number}."
        heads, attention = f"{ours}attention.heads.", f"{theirs}attn."
        found += norm(block.attention_norm, f"{theirs}ln_1", f"{ours}attention_norm")
        # Queries, keys and values are thirds of one projection, and each head has a KV head.
        qkv = f"{attention}c_attn."
        found += [
            rearranged(f"{qkv}weight[0/3]", f"{heads}w_q.weight", "d (e r) -> e r d", e=1),
            _two_thirds(f"{qkv}weight", f"{heads}kv.weight"),
            rearranged(f"{qkv}bias[0/3]", f"{heads}b_q", "(e r) -> e r", e=1),
            _two_thirds(f"{qkv}bias", f"{heads}kv.bias"),
            rearranged(f"{attention}c_proj.weight", f"{heads}w_o.weight", "(e r) d -> e r d", e=1),
            same(f"{attention}c_proj.bias", f"{heads}b_o"),
        ]
        found += norm(block.feed_forward_norm, f"{theirs}ln_2", f"{ours}feed_forward_norm")
        layer = block.feed_forward
        n_experts = layer.n_experts if isinstance(layer, MixtureOfExperts) else 1
        mlp, experts = f"{theirs}mlp.", f"{ours}feed_forward.experts."
        found += [
            rearranged(
                f"{mlp}c_fc.weight", f"{experts}w_in.weight", "d (e f) -> e f d", e=n_experts
            ),
            rearranged(f"{mlp}c_fc.bias", f"{experts}b_in", "(e f) -> e f", e=n_experts),
            rearranged(
                f"{mlp}c_proj.weight", f"{experts}w_out.weight", "(e f) d -> e f d", e=n_experts
            ),
            same(f"{mlp}c_proj.bias", f"{experts}b_out"),
        ]
    found += norm(decoder.norm, "transformer.ln_f", "norm")
    if not decoder.tie_embeddings:
        found.append(same("lm_head.weight", "head.weight"))
    return found


def _two_thirds(theirs: str, ours: str) -> Entry:
    """Keys and values, the second and the last third of a projection `[D, 3D]` or its bias."""
    thirds = (f"{theirs}[1/3]", f"{theirs}[2/3]")
    return Entry(thirds, ours, _transposed_and_joined, _parted_and_transposed)


def _transposed_and_joined(theirs: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.t() for tensor in theirs])


def _parted_and_transposed(ours: Tensor) -> list[Tensor]:
    return [tensor.t().contiguous() for tensor in ours.chunk(2)]

"""The names that most families share: those of Llama, with other feed-forward layers."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

from torch import Tensor, nn

from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.experts import Experts, FeedForwardLayer, MixtureOfExperts
from lightning_dsmoe.hugging_face.weight_entries import (
    Entry,
    Layout,
    dense_glu,
    glu_experts,
    keys_and_values,
    query_heads,
    rearranged,
    same,
    stacked_glu_experts,
)

FeedForwardEntries = Callable[[FeedForwardLayer, str, str], list[Entry]]
"""Entries of a feed-forward layer, by its name in a decoder and the name of its block on disk."""


def llama_entries(decoder: Decoder, feed_forward: FeedForwardEntries) -> list[Entry]:
    """Entries of a decoder whose layers have the names of Llama.

    Args:
        decoder: for its sizes.
        feed_forward: makes the entries of one feed-forward layer.
    """
    entries = around_blocks(decoder)
    for number, block in enumerate(blocks_of(decoder)):
        ours, theirs = f"blocks.{number}.", f"model.layers.{number}."
        entries += norm(block.attention_norm, f"{theirs}input_layernorm", f"{ours}attention_norm")
        entries += self_attention(block, f"{ours}attention.heads.", f"{theirs}self_attn.")
        entries += norm(
            block.feed_forward_norm,
            f"{theirs}post_attention_layernorm",
            f"{ours}feed_forward_norm",
        )
        entries += feed_forward(block.feed_forward, f"{ours}feed_forward.", theirs)
    return entries


def around_blocks(decoder: Decoder) -> list[Entry]:
    """Entries of the embeddings, the last norm and a head that is not tied."""
    entries = [same("model.embed_tokens.weight", "embedding.weight")]
    entries += norm(decoder.norm, "model.norm", "norm")
    if not decoder.tie_embeddings:
        entries.append(same("lm_head.weight", "head.weight"))
    return entries


def blocks_of(decoder: Decoder) -> Iterable[Block]:
    """The blocks of a decoder, typed."""
    return cast(Iterable[Block], decoder.blocks)


def norm(module: nn.Module, theirs: str, ours: str) -> list[Entry]:
    """Weight and, where there is one, bias of a normalisation."""
    return [same(f"{theirs}.{name}", f"{ours}.{name}") for name, _ in module.named_parameters()]


def self_attention(block: Block, ours: str, theirs: str) -> list[Entry]:
    """Projections, biases and norms of the query, key and value heads."""
    heads = cast(HeadGroups, block.attention.heads)
    return [
        *query_heads(heads, ours, q=f"{theirs}q_proj.", o=f"{theirs}o_proj."),
        *keys_and_values(heads, ours, k=f"{theirs}k_proj.", v=f"{theirs}v_proj."),
        *head_norms(heads, ours, theirs),
    ]


def head_norms(heads: HeadGroups, ours: str, theirs: str) -> list[Entry]:
    """Norms of queries and keys, over each head or over all of them in the order of the heads."""
    if isinstance(heads.q_norm, nn.Identity):
        return []
    names = [(f"{theirs}{of}_norm.weight", f"{ours}{of}_norm.weight") for of in ("q", "k")]
    if cast(Tensor, heads.k_norm.weight).ndim == 1:
        return [same(*each) for each in names]
    of_heads = partial(rearranged, h=heads.n_heads, c=heads.d_head)
    return [
        of_heads(*names[0], pattern="(h e c) -> e h c"),
        of_heads(*names[1], pattern="(h c) -> h c"),
    ]


def swiglu(layer: FeedForwardLayer, ours: str, theirs: str) -> list[Entry]:
    """A dense feed-forward layer of a Llama, all of it one expert or split into several."""
    gate, up, down = (f"{theirs}mlp.{name}_proj." for name in ("gate", "up", "down"))
    n_experts = layer.n_experts if isinstance(layer, MixtureOfExperts) else 1
    bias = cast(Experts, layer.experts).bias
    return dense_glu(gate, up, down, f"{ours}experts.", n_experts=n_experts, bias=bias)


def mixture(layer: FeedForwardLayer, ours: str, theirs: str, layout: Layout) -> list[Entry]:
    """A mixture of gated experts as the Qwen families store it, or a dense layer in its place."""
    if not isinstance(layer, MixtureOfExperts):
        return swiglu(layer, ours, theirs)
    return [
        same(f"{theirs}mlp.gate.weight", f"{ours}router.weight"),
        *experts_of(layer, ours, f"{theirs}mlp.experts.", layout),
    ]


def experts_of(
    layer: MixtureOfExperts,
    ours: str,
    theirs: str,
    layout: Layout,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[Entry]:
    """The experts of a mixture, one by one or stacked.

    Args:
        layer: ours, for their number.
        ours: its name with its dot.
        theirs: what the names of the experts on disk begin with.
        layout: how they are stored.
        names: of the gate, up and down projection where each expert has its own.
    """
    if layout == "stacked":
        both = f"{theirs}gate_up_proj", f"{theirs}down_proj"
        return stacked_glu_experts(*both, f"{ours}experts.")
    gate, up, down = (
        [f"{theirs}{number}.{name}.weight" for number in range(layer.n_experts)] for name in names
    )
    return glu_experts(list(zip(gate, up, down, strict=True)), f"{ours}experts.")

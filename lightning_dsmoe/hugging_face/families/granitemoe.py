"""GraniteMoe and GraniteMoeShared: stacked experts, a shared one, and constant multipliers."""

from functools import partial

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForwardLayer, MixtureOfExperts
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.families import llama_fields as fields
from lightning_dsmoe.hugging_face.families.naming import llama_entries
from lightning_dsmoe.hugging_face.source_model import Multipliers, SourceModel
from lightning_dsmoe.hugging_face.weight_entries import (
    Entry,
    Layout,
    rearranged,
    same,
    stacked_glu_experts,
)


def read(config: ConfigFile) -> SourceModel:
    """The architecture of a GraniteMoeForCausalLM."""
    return _read(config, d_shared=0)


def read_shared(config: ConfigFile) -> SourceModel:
    """The architecture of a GraniteMoeSharedForCausalLM."""
    return _read(config, d_shared=config.count("shared_intermediate_size"))


def _read(config: ConfigFile, d_shared: int) -> SourceModel:
    return SourceModel(
        **fields.llama_fields(config),
        **fields.all_biases(config),
        mixture=fields.read_mixture(
            config, "intermediate_size", renormalize=True, d_shared=d_shared
        ),
        multipliers=Multipliers(
            embedding=config.number("embedding_multiplier", 1.0),
            attention=config.number("attention_multiplier", 1.0),
            residual=config.number("residual_multiplier", 1.0),
            logits=1 / config.number("logits_scaling", 1.0),
        ),
    )


def entries(decoder: Decoder, layout: Layout) -> list[Entry]:
    """The weight map of either; the multipliers are not in it."""
    return llama_entries(decoder, partial(_feed_forward, layout=layout))


def _feed_forward(layer: FeedForwardLayer, ours: str, theirs: str, layout: Layout) -> list[Entry]:
    if not isinstance(layer, MixtureOfExperts):
        raise ValueError("every layer of GraniteMoe is a mixture of experts")
    moe, shared = f"{theirs}block_sparse_moe.", f"{theirs}shared_mlp."
    names = (
        (f"{moe}input_linear.weight", f"{moe}output_linear.weight", f"{moe}router.layer.weight")
        if layout == "original"
        else (f"{moe}experts.gate_up_proj", f"{moe}experts.down_proj", f"{moe}router.weight")
    )
    found = [
        same(names[2], f"{ours}router.weight"),
        *stacked_glu_experts(*names[:2], f"{ours}experts."),
    ]
    if layer.shared is not None:
        found += _alone(f"{shared}input_linear.weight", f"{shared}output_linear.weight", ours)
    return found


def _alone(w_in: str, w_out: str, ours: str) -> list[Entry]:
    """The shared expert, a stack of one in ours."""
    return [
        rearranged(w_in, f"{ours}shared.experts.w_in.weight", "(e f) d -> e f d", e=1),
        rearranged(w_out, f"{ours}shared.experts.w_out.weight", "d (e f) -> e f d", e=1),
    ]

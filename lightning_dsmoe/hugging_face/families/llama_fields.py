"""The fields of a configuration that most families share: those of Llama."""

from typing import Any

from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.rope import read_rope
from lightning_dsmoe.hugging_face.source_model import Mixture
from lightning_dsmoe.reading import MAX_LAYERS
from lightning_dsmoe.serialization.class_paths import MAX_EXPERTS


def llama_fields(
    config: ConfigFile,
    *,
    eps: float = 1e-6,
    theta: float = 10000.0,
    tied: bool = False,
    positions: int = 2048,
    d_hidden: str = "intermediate_size",
    activation: str = "hidden_act",
) -> dict[str, Any]:
    """Arguments of `SourceModel` that every family with rotary positions has.

    Args:
        config: the configuration.
        eps: epsilon of the norms where it names none; the next three are alike.
        theta: base of the rotary frequencies.
        tied: whether the head shares the weights of the embeddings.
        positions: longest context.
        d_hidden: name of the width of a feed-forward layer.
        activation: name of its activation.
    """
    d_model, n_heads = config.size("hidden_size"), config.size("num_attention_heads")
    n_kv_heads = config.size("num_key_value_heads", default=n_heads)
    if n_heads % n_kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads={n_heads}")
    if d_model % n_heads and not config.has("head_dim"):
        config.refuse("num_attention_heads", f"a divisor of hidden_size={d_model}, or a head_dim")
    d_head = config.size("head_dim", default=max(1, d_model // n_heads))
    if d_head % 2:
        config.problems.append(
            f"heads of odd width {d_head} are not supported (head_dim, or hidden_size over "
            "num_attention_heads); what is: even ones"
        )
    max_positions = config.size("max_position_embeddings", default=positions)
    return {
        "family": config.fields["model_type"],
        "vocab_size": config.size("vocab_size"),
        "d_model": d_model,
        "n_layers": config.size("num_hidden_layers", most=MAX_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "d_hidden": config.size(d_hidden),
        "max_positions": max_positions,
        "norm_eps": config.number("rms_norm_eps", eps, least=0),
        "tie_embeddings": config.flag("tie_word_embeddings", tied),
        "activation": config.activation(activation, "silu"),
        "rope": read_rope(config, default_theta=theta, max_positions=max_positions),
    }


def all_biases(config: ConfigFile) -> dict[str, Any]:
    """Biases of all four projections of attention, or of none."""
    bias = config.flag("attention_bias", False)
    return {"bias": bias, "output_bias": bias}


def read_mixture(
    config: ConfigFile, d_expert: str, *, renormalize: bool | None = None, **options: Any
) -> Mixture:
    """The mixture of a configuration.

    Args:
        config: the configuration.
        d_expert: name of the width of one expert.
        renormalize: whether gates are made to sum to one; None reads it.
        **options: more arguments of `Mixture`.
    """
    n_experts = config.size("num_experts", "num_local_experts", most=MAX_EXPERTS)
    if renormalize is None:
        renormalize = config.flag("norm_topk_prob", False)
    # Its default differs from family to family, and a field top_k is that of sampling.
    k = config.size("num_experts_per_tok", most=n_experts)
    return Mixture(n_experts, k, renormalize, config.size(d_expert), **options)


def qwen_dense_layers(config: ConfigFile) -> frozenset[int]:
    """Layers of a Qwen mixture that are dense: those named, and all but each so many."""
    n_layers = config.size("num_hidden_layers", most=MAX_LAYERS)
    named = config.layers("mlp_only_layers", n_layers)
    step = config.size("decoder_sparse_step", default=1)
    return named | {layer for layer in range(n_layers) if (layer + 1) % step}


def check_window(
    config: ConfigFile,
    *,
    default: int | None,
    positions: int,
    switch: str | None = None,
    by_layer: bool = False,
) -> None:
    """Refuse attention over a window that is shorter than the context.

    Args:
        config: the configuration.
        default: window where it names none.
        positions: longest context where it names none.
        switch: name of the field that turns windows on; None where they are on.
        by_layer: whether the class reads `layer_types`; others have the window in all layers.
    """
    layers = config.fields.get("layer_types")
    if layers is not None:
        kinds = set(map(str, layers)) if isinstance(layers, list) else {""}
        if kinds - {"full_attention", "sliding_attention"}:
            config.refuse("layer_types", "full_attention in all layers")
            return
        if by_layer and kinds == {"full_attention"}:
            return
    if switch is not None and not config.flag(switch, False):
        return
    window = config.fields.get("sliding_window", default)
    longest = config.size("max_position_embeddings", default=positions)
    if window is not None and not (isinstance(window, int) and window >= longest):
        config.fields.setdefault("sliding_window", window)
        config.refuse(
            "sliding_window",
            f"full attention, which is the same up to {window!r:.20} tokens: edit config.json to "
            "have that as max_position_embeddings",
        )

"""Rotary positions of a layer in the words of transformers 5."""

from typing import Any

from lightning_dsmoe.attention import (
    GroupedQueryAttention,
    LinearRopeScaling,
    Llama3RopeScaling,
    MixtureOfAttentionHeads,
    YarnRopeScaling,
)


def rope_parameters(layer: GroupedQueryAttention | MixtureOfAttentionHeads) -> dict[str, Any]:
    """The `rope_parameters` of a `config.json`.

    Args:
        layer: attention with rotary positions.

    Raises:
        ValueError: if there are none, or no stock class computes them.

    Examples:
        >>> rope_parameters(GroupedQueryAttention(8, 2, 1, 4, rope_theta=500.0))
        {'rope_type': 'default', 'rope_theta': 500.0}
    """
    if layer.rope_theta is None:
        raise ValueError("rope_theta=None leaves out rotary positions")
    if layer.rotary_fraction != 1:
        raise ValueError(
            f"rotary_fraction={layer.rotary_fraction}, stock classes turn all channels"
        )
    theta, scaling = float(layer.rope_theta), layer.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    if type(scaling) is LinearRopeScaling:
        return {"rope_type": "linear", "rope_theta": theta, "factor": scaling.factor}
    if type(scaling) is Llama3RopeScaling:
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    if type(scaling) is YarnRopeScaling:
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
            "truncate": scaling.truncate,
        }
    raise ValueError(f"transformers has no {type(scaling).__name__}")

"""Rotary positions in a configuration of transformers, in either of its two forms.

`rope_parameters` of version 5 holds all; earlier there were `rope_theta` and `rope_scaling`.
"""

from typing import NamedTuple

from lightning_dsmoe.attention import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling
from lightning_dsmoe.attention.rope_scaling import RopeScaling
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.serialization.class_paths import MAX_SIZE

_SUPPORTED = "the rope types default, linear, llama3 and yarn"
_MAX_THETA = 2.0**53


class Rope(NamedTuple):
    """Base of the frequencies, and how they are scaled."""

    theta: float
    scaling: RopeScaling | None


def read_rope(config: ConfigFile, *, default_theta: float, max_positions: int) -> Rope:
    """Read rotary positions; what is not supported becomes a problem of the configuration.

    Args:
        config: the configuration.
        default_theta: base where it names none.
        max_positions: its longest context.
    """
    form = "rope_parameters" if config.has("rope_parameters") else "rope_scaling"
    if config.fields.get("rope_scaling") and form == "rope_parameters":
        config.refuse("rope_scaling", "one of rope_parameters and rope_scaling, not both")
    given = config.fields.get(form) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        config.refuse(form, f"one object for all layers, with {_SUPPORTED}")
        return Rope(default_theta, None)
    both = {"rope_theta": config.fields.get("rope_theta"), **given}
    rope = ConfigFile(both, form)
    # The factor of partial rotary positions is in either place, and does not always hold there.
    for fields in (config, rope):
        fields.refuse_unless("partial_rotary_factor", (1, 1.0), "1, all channels of a head rotate")
    original = "original_max_position_embeddings"
    if config.has(original):  # There it would count before that of the scaling.
        config.refuse_unless(original, (rope.fields.get(original),), f"it in {form} alone")
    theta = rope.number("rope_theta", default_theta, most=_MAX_THETA)
    scaling = _read_scaling(rope, max_positions)
    config.problems += [f"{form}: {problem}" for problem in rope.problems]
    return Rope(theta, scaling)


def _read_scaling(rope: ConfigFile, max_positions: int) -> RopeScaling | None:
    key = "rope_type" if rope.has("rope_type") else "type"
    kind = rope.fields.get(key, "default")
    if kind == "default" or kind is None:
        return None
    if kind not in ("linear", "llama3", "yarn"):
        rope.refuse(key, _SUPPORTED)
        return None
    factor = rope.number("factor", 0.0, least=1.0, most=MAX_SIZE)
    if not rope.has("factor"):
        rope.problems.append("factor is missing")
    original = rope.size("original_max_position_embeddings", default=max_positions)
    try:
        if kind == "linear":
            return None if rope.problems else LinearRopeScaling(factor)
        if kind == "llama3":
            low, high = (rope.number(f"{end}_freq_factor", 0.0) for end in ("low", "high"))
            return None if rope.problems else Llama3RopeScaling(factor, low, high, original)
        for name in ("mscale", "mscale_all_dim"):
            rope.refuse_unless(name, (), "none, with attention_factor instead")
        scale = rope.number("attention_factor", 0.0) if rope.has("attention_factor") else None
        fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
        truncate = rope.flag("truncate", True)
        if rope.problems:
            return None
        return YarnRopeScaling(factor, original, fast, slow, scale, truncate)
    except ValueError as error:
        rope.problems.append(str(error))
        return None

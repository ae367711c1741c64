"""A decoder's architecture as plain data, and back.

The description looks like a YAML configuration: a `class_path` and its `init_args` for every part,
and a list of those, one for each layer, where layers differ. It is read from the modules
themselves, each of which keeps its constructor's options as attributes.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import RopeScaling
from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.placement import WithoutDrawing
from lightning_dsmoe.reading import MAX_LAYERS, Bounds, check_json, shown
from lightning_dsmoe.serialization.class_paths import (
    MAX_SIZE,
    PARTS,
    PARTS_OF_LAYERS,
    check_sizes,
    known_class,
    named_object,
    shortest_path,
)
from lightning_dsmoe.serialization.pruning import Remaining, remaining_experts, remove_experts

Description = dict[str, Any]

_PART = {"class_path": str, "init_args": dict}
_PARTS = (*PARTS_OF_LAYERS, "norm")
_OF_LAYERS = Annotated[list[_PART], Bounds(1, MAX_LAYERS)]  # type: ignore[valid-type]
_FIELDS = {
    "vocab_size": Annotated[int, Bounds(1, MAX_SIZE)],
    "d_model": Annotated[int, Bounds(1, MAX_SIZE)],
    "n_layers": Annotated[int, Bounds(1, MAX_LAYERS)],
    "max_positions": Annotated[int, Bounds(1, MAX_SIZE)] | None,
    "tie_embeddings": bool,
    **dict.fromkeys(_PARTS, _PART),
}
_REMAINING = "remaining"
"""A field of pruned decoders only: the experts of each layer, null for all of them."""

_N_SIZES = {name: part.n_sizes for name, part in PARTS.items() if part.n_sizes is not None}
_NOT_KEPT = {"device", "dtype"}
_PLAIN = bool | int | float | str | None


def describe_decoder(decoder: Decoder) -> Description:
    """Describe a decoder as plain data.

    Args:
        decoder: the decoder.

    Returns:
        Sizes, and `class_path` and `init_args` of every part; plain data, ready for JSON. Attention
        and feed-forward layers that differ by more than removed experts are described one by one.

    Raises:
        ValueError: if norms differ, or if a part does not keep its options as attributes, is of a
            class that cannot be imported by its path, or is larger than `build_decoder` accepts.
    """
    blocks = list(cast(Iterable[Block], decoder.blocks))
    norms = [decoder.norm, *(n for b in blocks for n in (b.attention_norm, b.feed_forward_norm))]
    described: Description = {"norm": _describe(decoder.norm, "norm")}
    if any(_describe(norm, "norm") != described["norm"] for norm in norms):
        raise ValueError("the norms of this decoder differ, which a description cannot hold")
    for name in PARTS_OF_LAYERS:
        of_layers = [_describe(getattr(block, name), name) for block in blocks]
        described[name] = (
            of_layers if any(each != of_layers[0] for each in of_layers) else of_layers[0]
        )
    remaining = remaining_experts(decoder)
    options = {name: getattr(decoder, name) for name in _FIELDS if name not in _PARTS}
    check_sizes(options)
    pruned = {} if remaining is None else {_REMAINING: remaining.to_dict()}
    return {**options, **{name: described[name] for name in _PARTS}, **pruned}


def build_decoder(description: Description) -> Decoder:
    """Build a described decoder on the meta device, without memory for weights or random numbers.

    Only classes of this library, normalisations of `torch.nn`, and classes already imported are
    used; nothing is imported because a description names it.

    Args:
        description: what `describe_decoder` returned.

    Returns:
        The decoder in evaluation mode, on the meta device.

    Raises:
        ValueError: if the description is invalid, or asks for larger sizes than any model has.

    Examples:
        >>> from functools import partial
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> heads = partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4)
        >>> experts = partial(MixtureOfExperts, n_experts=4, d_expert=6)
        >>> decoder = Decoder(8, 8, n_layers=1, attention=heads, feed_forward=experts)
        >>> description = describe_decoder(decoder)
        >>> description["feed_forward"]["class_path"]
        'lightning_dsmoe.MixtureOfExperts'
        >>> build_decoder(description).embedding.weight.device
        device(type='meta')
    """
    given = description if isinstance(description, dict) else {}
    is_pruned = _REMAINING in given
    fields = {**_FIELDS, _REMAINING: Remaining} if is_pruned else _FIELDS
    lists = [name for name in PARTS_OF_LAYERS if isinstance(given.get(name), list)]
    check_json("architecture", description, {**fields, **dict.fromkeys(lists, _OF_LAYERS)})
    try:
        options = {name: description[name] for name in _FIELDS}
        options |= {part: _factory(description[part], part) for part in _PARTS if part not in lists}
        options |= {
            part: [_factory(of_layer, part) for of_layer in description[part]] for part in lists
        }
        with torch.device("meta"), WithoutDrawing():
            decoder = Decoder(**options).eval()
    except ValueError as error:  # of a part, which may show a value as long as the file
        raise ValueError(f"{' '.join(str(error).split()):.1000}") from None
    except (AttributeError, OverflowError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"not an architecture: {reason:.1000}") from None
    if is_pruned:
        remove_experts(decoder, Remaining.from_dict(description[_REMAINING]))
    return decoder


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two descriptions, each as "name was this, is that".

    An option that came to a class after a description was written has its default there.
    """
    if not isinstance(before, dict):  # of a file, which may hold anything there
        return [f"the architecture was {shown(before)}"]
    return _differences(_with_present_options(before), _with_present_options(now))


def _with_present_options(description: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return describe_decoder(build_decoder(dict(description)))
    except ValueError:  # of a class that is not known, or not a description
        return description


def _differences(before: object, now: object, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            difference
            for key in keys
            for difference in _differences(
                before.get(key), now.get(key), f"{name}.{_in_words(key)}".strip(".")
            )
        ]
    if isinstance(before, list) != isinstance(now, list) and {*PARTS_OF_LAYERS} & {name}:
        return _differences(_one_by_one(before, now), _one_by_one(now, before), name)
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            difference
            for at, pair in enumerate(zip(before, now, strict=True))
            for difference in _differences(*pair, f"{name}.{at}")
        ]
    if name.endswith("class_path") and named_object(before) is named_object(now) is not None:
        return []
    try:
        if before == now:
            return []
    except RuntimeError:  # of tensors, which are no options
        pass
    return [f"{name.replace('.init_args', '')} was {_in_words(before)}, is {_in_words(now)}"]


def _in_words(value: object) -> str:
    """A value as a message shows it, words without quotes."""
    is_word = isinstance(value, str) and value.replace(".", "").isidentifier()
    return f"{value:.200}" if is_word else shown(value)


def _one_by_one(part: object, like: object) -> object:
    """One description for all layers as a list of as many as another has."""
    return [part] * len(like) if isinstance(like, list) else part


def _describe(module: object, part: str) -> Description:
    """Class and options of a part, without the sizes that its owner gives it."""
    cls = type(module)
    if part not in _N_SIZES:
        raise ValueError(f"option {part!r} is a {cls.__name__}, which is not plain data")
    path = shortest_path(cls)
    if known_class(path, part) is not cls:
        raise ValueError(f"the class of {part} cannot be found again at {path}")
    options = {}
    for parameter in list(inspect.signature(cls).parameters.values())[_N_SIZES[part] :]:
        if parameter.name in _NOT_KEPT:
            continue
        if not hasattr(module, parameter.name):
            raise ValueError(
                f"{cls.__name__} does not keep its option {parameter.name!r} as an attribute, "
                "which saving its architecture needs"
            )
        options[parameter.name] = _value(getattr(module, parameter.name), parameter)
    check_sizes(options)
    return {"class_path": path, "init_args": options}


def _value(value: object, parameter: inspect.Parameter) -> object:
    is_switch = isinstance(parameter.default, bool)
    if is_switch and (value is None or isinstance(value, Tensor | nn.Module)):
        return value is not None  # what the option asks for, or its absence
    if isinstance(value, nn.Module | RopeScaling):
        return _describe(value, parameter.name)
    if isinstance(value, _PLAIN):
        return value
    raise ValueError(f"option {parameter.name!r} is {shown(value)}, which is not plain data")


def _factory(description: object, part: str) -> Callable[..., Any]:
    class_path, options = (check_json(part, description, _PART)[field] for field in _PART)
    cls = known_class(class_path, part)
    if not_plain := sorted(_NOT_KEPT & set(options)):
        raise ValueError(f"{part}: init_args must not name {' or '.join(not_plain)}")
    check_sizes(options)
    return partial(cls, **{name: _option(name, value) for name, value in options.items()})


def _option(name: str, value: object) -> object:
    if name in _N_SIZES and (value is not None or _N_SIZES[name]):
        make = _factory(value, name)
        return make if _N_SIZES[name] else make()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"option {name!r} must be finite, got {value}")
    if isinstance(value, _PLAIN):
        return value
    raise ValueError(f"option {name!r} must be plain data, got {shown(value)}")


def describe_part(module: nn.Module, part: str) -> Description:
    """Class and options of a layer, without its width, as `describe_decoder` has them."""
    return _describe(module, part)


def part_factory(description: object, part: str) -> Callable[..., Any]:
    """The factory of a described layer, of classes that are known; called with its width."""
    return _factory(description, part)

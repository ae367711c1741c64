"""A decoder's architecture as plain data, and back.

The data looks like a YAML configuration: a `class_path` and its `init_args` for every part. It is
read off the parts themselves, each of which keeps its constructor's options as attributes.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import Attention
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import Experts, FeedForwardLayer
from lightning_dsmoe.routing import Router

Description = dict[str, Any]

_BASES: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "feed_forward": FeedForwardLayer,
    "norm": nn.Module,
    "router": Router,
    "experts": Experts,
}
_GIVEN_BY_OWNER = {"attention": 1, "feed_forward": 1, "norm": 1, "router": 2, "experts": 3}
"""Leading sizes that the owner of a part passes to its factory, by the part's name."""

_NOT_KEPT = {"device", "dtype"}
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_SIZE = 2**24


def describe_decoder(decoder: Decoder) -> Description:
    """Describe a decoder whose blocks are all made alike.

    Raises:
        ValueError: if blocks differ, or a part does not keep its options as attributes.
    """
    parts = [
        {
            "attention": _describe(block.attention, "attention"),
            "feed_forward": _describe(block.feed_forward, "feed_forward"),
            "norm": _describe(block.attention_norm, "norm"),
        }
        for block in decoder.blocks
    ]
    if any(part != parts[0] for part in parts):
        raise ValueError("the blocks of this decoder differ, which a description cannot hold")
    return {
        "vocab_size": decoder.vocab_size,
        "d_model": decoder.d_model,
        "n_layers": decoder.n_layers,
        "max_positions": decoder.max_positions,
        "tie_embeddings": decoder.tie_embeddings,
        **parts[0],
    }


def build_decoder(description: Description) -> Decoder:
    """Build a described decoder on the meta device: no memory is taken and no weight is drawn.

    Only classes of this library, of `torch.nn`, and classes already imported are used; nothing is
    imported because a description names it.

    Raises:
        ValueError: if the description is not one, or asks for more than any model has.
    """
    expected = {"vocab_size", "d_model", "n_layers", "max_positions", "tie_embeddings"}
    expected |= {"attention", "feed_forward", "norm"}
    if not isinstance(description, dict) or set(description) != expected:
        raise ValueError(f"an architecture is an object with the fields {sorted(expected)}")
    _check_sizes(description)
    if description["n_layers"] > MAX_LAYERS:
        raise ValueError(f"n_layers={description['n_layers']}, at most {MAX_LAYERS} are allowed")
    options = dict(description)
    for part in ("attention", "feed_forward", "norm"):
        options[part] = _factory(options[part], part)
    try:
        with torch.device("meta"):
            return Decoder(**options).eval()
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"not an architecture: {error}") from None


def _describe(module: nn.Module, part: str) -> Description:
    """Class and options of a part, without the sizes that its owner gives it."""
    cls = type(module)
    parameters = list(inspect.signature(cls).parameters.values())[_GIVEN_BY_OWNER[part] :]
    options = {}
    for parameter in parameters:
        if parameter.name in _NOT_KEPT:
            continue
        if not hasattr(module, parameter.name):
            raise ValueError(
                f"{cls.__name__} does not keep its option {parameter.name!r} as an attribute, "
                "which saving its architecture needs"
            )
        options[parameter.name] = _value(getattr(module, parameter.name), parameter)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": options}


def _value(value: object, parameter: inspect.Parameter) -> object:
    if isinstance(parameter.default, bool) and (value is None or isinstance(value, Tensor)):
        return value is not None
    if isinstance(value, nn.Module):
        return _describe(value, parameter.name)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"option {parameter.name!r} is {value!r}, which is not plain data")


def _factory(description: object, part: str) -> Callable[..., nn.Module]:
    if not isinstance(description, dict) or set(description) != {"class_path", "init_args"}:
        raise ValueError(f"{part} needs a class_path and init_args, got {description!r:.200}")
    cls = _known_class(description["class_path"], _BASES[part])
    options = description["init_args"]
    if not isinstance(options, dict):
        raise ValueError(f"init_args of {part} must be an object, got {options!r:.200}")
    _check_sizes(options)
    return partial(
        cls,
        **{
            name: _factory(value, name) if isinstance(value, dict) and name in _BASES else value
            for name, value in options.items()
        },
    )


def _known_class(path: object, base: type[nn.Module]) -> type[nn.Module]:
    """The class at an import path, without importing anything foreign."""
    module_name, _, name = str(path).rpartition(".")
    if module_name.split(".")[0] == "lightning_dsmoe" and _is_ours(module_name):
        module = importlib.import_module(module_name)
    elif module_name == "torch.nn" or module_name.startswith("torch.nn.modules."):
        module = sys.modules.get(module_name, torch.nn)
    else:
        module = sys.modules.get(module_name)
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(
            f"{path!r} is not a {base.__name__} of lightning_dsmoe or torch.nn, nor one that is "
            "imported already; import the module that defines it first"
        )
    return cls


def _is_ours(module_name: str) -> bool:
    rooms = ("routing", "experts", "attention")
    return any(module_name.startswith(f"lightning_dsmoe.{room}") for room in rooms)


def _check_sizes(options: dict[str, Any]) -> None:
    for name, value in options.items():
        most = MAX_EXPERTS if name == "n_experts" else MAX_SIZE
        if isinstance(value, int) and not 0 <= value <= most:
            raise ValueError(f"{name}={value} is out of range, 0 to {most} is allowed")

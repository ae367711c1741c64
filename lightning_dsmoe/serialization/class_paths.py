"""Which classes a file may name, and how large the sizes in it may be.

Nothing is imported because a file names it, since importing runs code. A class is accepted if its
module is imported already and it is a subclass of the part's base. Sizes are bounded because a
module built from a file that asks for 10^9 experts would fill the memory before any check.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from torch import nn, optim

import lightning_dsmoe.schedules  # noqa: F401 - files may name it
from lightning_dsmoe.attention import Attention, RopeScaling
from lightning_dsmoe.experts import Experts, FeedForwardLayer
from lightning_dsmoe.moved import current_name
from lightning_dsmoe.reading import MAX_LAYERS, shown
from lightning_dsmoe.routing import Router, Selection


class Part(NamedTuple):
    """What may stand under a name in a configuration.

    `n_sizes` counts the leading arguments that the part's owner passes to its factory, such as
    `d_model`, which a file does not repeat. It is 0 for a part that is no factory, but made before
    its owner, and None for what is not a part of a decoder.
    """

    base: type
    n_sizes: int | None = None


PARTS = {
    "attention": Part(Attention, 1),
    "feed_forward": Part(FeedForwardLayer, 1),
    "norm": Part(nn.Module, 1),
    "router": Part(Router, 2),
    "experts": Part(Experts, 3),
    "rope_scaling": Part(RopeScaling, 0),
    "expert_selection": Part(Selection),
    "attention_selection": Part(Selection),
    "optimizer": Part(optim.Optimizer),
    "lr_scheduler": Part(optim.lr_scheduler.LRScheduler),
}
PARTS_OF_LAYERS = ("attention", "feed_forward")
"""Those of which there may be a list, one for each layer."""
MAX_EXPERTS = 4096
MAX_SIZE = 2**24
_MAX_NAME = 200
_LIMITS = {"n_layers": MAX_LAYERS, "n_experts": MAX_EXPERTS, "rope_theta": 2**53}
_WITHOUT_SIZES = ("optimizer", "lr_scheduler")
_NUMBER = bool | int | float | None
_TORCH_NORMS = (nn.RMSNorm, nn.LayerNorm)


def known_class(path: object, part: str) -> type:
    """The class at an import path, which must be one that a file may name for this part.

    Args:
        path: module and name, joined by a dot.
        part: name of the part, such as "router"; a part of another name may be of any base.

    Raises:
        ValueError: for anything else.
    """
    parts = [PARTS[part]] if part in PARTS else PARTS.values()
    bases = tuple(dict.fromkeys(each.base for each in parts))  # in one order, for the message
    found = named_object(path)
    if not (isinstance(found, type) and issubclass(found, bases)) or _is_other_torch_module(found):
        raise _unknown(path, *bases)
    return found


def _unknown(path: object, *bases: type) -> ValueError:
    """The error for a class that is not known, with what would make it known."""
    module, _, _ = str(path).rpartition(".")
    how = ""
    if module == "__main__" or "<locals>" in module:
        how = "; define it at the top of a module that can be imported"
    elif module not in sys.modules and all(map(str.isidentifier, module.split("."))):
        how = (
            f"; import the module that defines it first, if you trust it: import {module} in "
            f"Python, --import {module} on the command line"
        )
    names = " or ".join(base.__name__ for base in bases)
    return ValueError(f"{shown(path)} is not a known {names}{how:.200}")


def named_object(path: object) -> object:
    """The object at a dotted path in a module that is already imported; None if there is none.

    Paths of modules that were moved since the file was written lead to the same objects.
    """
    module_name, _, name = str(path).rpartition(".")
    module = sys.modules.get(current_name(module_name))
    if module_name == "lightning_dsmoe":
        return getattr(module, name, None)  # its public names are looked up when first used
    return vars(module).get(name) if module else None


def shortest_path(cls: type) -> str:
    """A class's path through the shortest prefix of its module that leads to it.

    `lightning_dsmoe.TopK` stays valid when its file is moved or renamed.
    """
    modules = accumulate(cls.__module__.split("."), "{}.{}".format)
    paths = [f"{module}.{cls.__qualname__}" for module in modules]
    return next((path for path in paths if named_object(path) is cls), paths[-1])


def check_sizes(options: Mapping[str, Any]) -> None:
    """Raise a ValueError if an integer option is negative or larger than any model needs."""
    _check_names(options)
    for name, value in options.items():
        most = _LIMITS.get(name, MAX_SIZE)
        if isinstance(value, int) and not 0 <= value <= most:
            raise ValueError(f"{name}={value} is out of range, 0 to {most} is allowed")


def check_hyperparameters(options: Mapping[str, Any], base: type) -> None:
    """Check the arguments that a command line stored in a checkpoint, before any is used.

    Args:
        options: the hyper-parameters.
        base: class of the model they are for.

    Raises:
        ValueError: if a class is not known, a size is too large or a value is not plain data.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"hyper-parameters must be an object, got {shown(options)}")
    options = {name: value for name, value in options.items() if name != "_instantiator"}
    model_path = options.pop("_class_path", None)
    if model_path is not None:
        model = named_object(model_path)
        if not (isinstance(model, type) and issubclass(model, base)):
            raise _unknown(model_path, base)
    check_sizes(options)
    _check_options(options)


def _check_names(options: Mapping[Any, Any]) -> None:
    for name in options:
        if not (isinstance(name, str) and name.isidentifier() and len(name) <= _MAX_NAME):
            raise ValueError(f"{shown(name)} is not the name of an option")


def _check_options(options: Mapping[str, Any]) -> None:
    _check_names(options)
    for name, value in options.items():
        if isinstance(value, Mapping):
            _check_part(name, value)
        elif name in PARTS_OF_LAYERS and isinstance(value, list | tuple):
            _check_parts(name, value)
        elif value is not None and name in PARTS:
            raise ValueError(f"{name} needs a class_path and init_args, got {shown(value)}")
        elif isinstance(value, str) and not value.isidentifier():
            raise ValueError(f"{name} must be a plain word, got {shown(value)}")
        elif isinstance(value, list | tuple) and not all(isinstance(v, _NUMBER) for v in value):
            raise ValueError(f"{name} may hold numbers only, got {shown(value)}")


def _check_parts(part: str, descriptions: Sequence[object]) -> None:
    if len(descriptions) > MAX_LAYERS:
        raise ValueError(f"{part} of {len(descriptions)} layers, up to {MAX_LAYERS} are allowed")
    for description in descriptions:
        if not isinstance(description, Mapping):
            raise ValueError(
                f"{part} needs a class_path and init_args for each layer, got {shown(description)}"
            )
        _check_part(part, description)


def _check_part(part: str, description: Mapping[str, Any]) -> None:
    if not {"class_path"} <= set(description) <= {"class_path", "init_args"}:
        raise ValueError(f"{part} needs a class_path and init_args, got {shown(description)}")
    known_class(description["class_path"], part)
    options = description.get("init_args") or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"init_args of {part} must be an object, got {shown(options)}")
    if part not in _WITHOUT_SIZES:
        check_sizes(options)
    _check_options(options)


def _is_other_torch_module(found: type) -> bool:
    """Whether this is a module of PyTorch other than the two normalisations that a norm may be."""
    is_torch = found.__module__.partition(".")[0] == "torch"
    return is_torch and issubclass(found, nn.Module) and found not in _TORCH_NORMS

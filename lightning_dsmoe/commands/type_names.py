"""What an option may be, in words, from its type annotation."""

import inspect
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_PLAINER = (
    (r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1"),
    (r"typing\.|collections\.abc\.", ""),
    (r"Expected a dot import path string: ", "no such class: "),
    (r"\. Got value: (.*?)( Subclass types expect.*)?$", r", got \1"),
    (r"^Expected", "expected"),
    (r"\.+$", ""),
)
_NORMS = {"torch.nn.LayerNorm", "torch.nn.RMSNorm"}  # of all modules, those that a model may take


def plainer(message: str) -> str:
    """A message of jsonargparse without the words of its types."""
    for pattern, plain in _PLAINER:
        message = re.sub(pattern, plain, message)
    return message


def in_words(hint: Any) -> list[str]:
    """What an option of plain types may be, such as "int" and "'auto'"."""
    if get_origin(hint) is Literal:
        return [repr(each) for each in get_args(hint)]
    if get_origin(hint) in (Union, UnionType):
        return [word for each in get_args(hint) if each is not NoneType for word in in_words(each)]
    return [hint.__name__ if isinstance(hint, type) else plainer(str(hint))]


def class_names(hint: Any) -> list[str]:
    """Names of the classes that an option may be, or that its factory may make."""
    from torch import nn  # takes seconds; whoever has a class to pass has loaded it

    names: set[str] = set()
    for base in _bases(hint):
        names |= _NORMS if base is nn.Module else _concrete(base) or {base.__name__}
    return sorted(names)


def _bases(hint: Any) -> list[type]:
    """Classes in a type annotation that are meant to have subclasses."""
    if get_origin(hint) in (Union, UnionType, list):
        return [base for each in get_args(hint) for base in _bases(each)]
    if get_origin(hint) is Callable:
        return _bases(get_args(hint)[-1])
    if getattr(hint, "_is_protocol", False):
        return _bases(inspect.signature(hint.__call__, eval_str=True).return_annotation)
    is_base = isinstance(hint, type) and not get_args(hint) and hint.__module__ != "builtins"
    return [hint] if is_base else []


def _concrete(base: type) -> set[str]:
    subclasses: list[type] = base.__subclasses__()
    return {
        name
        for cls in subclasses
        for name in _concrete(cls) | ({cls.__name__} if not inspect.isabstract(cls) else set())
        if not name.startswith("_")
    }

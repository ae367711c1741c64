"""Mistakes on the command line, said in one line."""

import re

from torch import nn

from lightning_dsmoe.attention import Attention
from lightning_dsmoe.experts import Experts, FeedForwardLayer
from lightning_dsmoe.routing import Router, Selection

_PLUG_POINTS: dict[str, type] = {
    "router": Router,
    "experts": Experts,
    "attention": Attention,
    "feed_forward": FeedForwardLayer,
    "expert_selection": Selection,
    "attention_selection": Selection,
    "norm": nn.Module,
}
_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value",
    "Not a valid subclass",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
    "a dict without",
    "Expected a path but",
)


def one_line(message: str) -> str:
    """Leave of a parser's message, which may be a whole tree, what went wrong and where."""
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    told = [line for line in lines if line and not line.startswith(_NOISE)]
    text = " ".join(told) or " ".join(message.split())
    text = re.sub(r"\.? Got value: (Namespace|NestedArg)\(.*", "", text)
    text = re.sub(r"Type <class '[\w.]+'> expects a function or a callable class: ", "", text)
    return text + _known_classes(text)


def _known_classes(text: str) -> str:
    """The classes to choose from, if the message is about a class that does not exist."""
    places = re.findall(r'Parser key "(?:[\w.]+\.)?(\w+)"', text)
    unknown = re.search(r"import path|has no attribute|[Nn]o module|not accessible", text)
    if not (unknown and places and places[-1] in _PLUG_POINTS):
        return ""
    base = _PLUG_POINTS[places[-1]]
    if base is nn.Module:
        return "; any torch.nn class of one size will do, such as torch.nn.RMSNorm"
    return f"; known classes: {', '.join(sorted(_concrete(base)))}"


def _concrete(base: type) -> set[str]:
    names: set[str] = set()
    cls: type
    for cls in base.__subclasses__():
        if not cls.__name__.startswith("_"):
            names.add(cls.__name__)
        names |= _concrete(cls)
    return names

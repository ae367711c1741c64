"""Mistakes on the command line, said in one line."""

import inspect
import re
import sys
from typing import NamedTuple

from lightning import Callback, LightningDataModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_dsmoe.attention import Attention
from lightning_dsmoe.experts import Experts, FeedForwardLayer
from lightning_dsmoe.routing import Router, Selection

_BASES: dict[str, type] = {
    "router": Router,
    "experts": Experts,
    "attention": Attention,
    "feed_forward": FeedForwardLayer,
    "expert_selection": Selection,
    "attention_selection": Selection,
    "norm": nn.Module,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
    "data": LightningDataModule,
    "callbacks": Callback,
}
_STRUCTURE = ("Does not validate against", "Subtypes:", "Errors:", "Given value", "Expected a path")
_GENERIC = (
    *_STRUCTURE,
    "Expected a <class 'NoneType'>",
    "Not a valid subclass",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
    "a dict without",
)
_PLAINER = (
    (r"<class '([\w.]+)'>", r"\1"),
    (r"Expected an? dot import path string: ", "no such class: "),
    (r"Expected an? (?:typing\.)?", "expected "),
    (r"\. Got value: ", ", got "),
    (r"\.$", ""),
)
_SURROGATES = r"'[\w-]+' codec can't encode (characters?.*?): surrogates not allowed"


class _Attempt(NamedTuple):
    """How one reading of a value failed: the keys and classes that lead to it, and the reason."""

    keys: tuple[str, ...]
    classes: tuple[str, ...]
    reason: str
    value: str


def one_line(message: str) -> str:
    """Say a message in one line; of a parser's tree of attempts, say the one that came furthest."""
    message = re.sub(r"\x1b\[[\d;]*m", "", message)
    # Bytes of the command line that are not UTF-8 reach Python as surrogates.
    message = re.sub(_SURROGATES, r"not UTF-8, \1", message)
    is_tree = message.startswith("Parser key") or "Does not validate against" in message
    attempts = is_tree and (_attempts(message, _GENERIC) or _attempts(message, _STRUCTURE))
    if not attempts:
        return " ".join(message.split())
    best = max(attempts, key=lambda attempt: len(attempt.keys) + len(attempt.classes))
    reason = re.sub(r"\.? Got value: (Namespace|NestedArg)\(.*", "", best.reason)
    if choices := _choices(message):
        reason = f"expected {choices}. Got value: {best.value}"
    if reason.startswith(("Expected a <", "Expected a typing")) and "Got value" not in reason:
        reason += f". Got value: {best.value}"
    for pattern, plain in _PLAINER:
        reason = re.sub(pattern, plain, reason)
    return ": ".join(filter(None, [".".join(best.keys), reason])) + _allowed(best)


def _choices(message: str) -> str:
    """All that a union of plain types and literals allows; nothing for a message of other kinds."""
    unions = re.findall(r"^\s*Subtypes: \[(.*)\]$", message, re.MULTILINE)
    subtypes = re.split(r", (?=typing\.|<)", unions[0]) if len(unions) == 1 else []
    plain = [re.fullmatch(r"typing\.Literal\[(.*)\]|<class '(\w+)'>", each) for each in subtypes]
    found = [(each[1] or each[2]).split(", ") for each in plain if each]
    if not found or not all(plain):
        return ""
    *names, last = [name for names in found for name in names if name != "NoneType"]
    return f"{', '.join(names)} or {last}" if names else last


def _attempts(message: str, left_out: tuple[str, ...]) -> list[_Attempt]:
    """Read the tree by its indentation."""
    attempts: list[_Attempt] = []
    stack: list[tuple[int, str, str]] = []
    for line in message.splitlines():
        text = re.sub(r"Type <class '[\w.]+'> expects a function.*? class: ", "", line).strip(" -")
        indent = len(line) - len(line.lstrip(" -"))
        while stack and stack[-1][0] >= indent and text:
            stack.pop()
        if found := re.match(r'Parser key "([\w.]+)"[^:]*: ?', text):
            stack.append((indent, found[1], ""))
            text = text[found.end() :]
        if found := re.fullmatch(r"Problem with given class_path '([\w.]+)':", text):
            stack.append((indent, "", found[1]))
        elif found := re.match(r"Given value: (?:NestedArg\(.*val=)?(.*?)\)?$", text):
            attempts = [a if a.value else a._replace(value=found[1]) for a in attempts]
        elif text and not text.startswith(left_out):
            keys = tuple(key for _, key, _ in stack if key)
            classes = tuple(cls for _, _, cls in stack if cls)
            classes += tuple(re.findall(r"Namespace\(class_path='([\w.]+)'", text)[:1])
            attempts.append(_Attempt(keys, classes, text, ""))
    return attempts


def _allowed(attempt: _Attempt) -> str:
    """What there is to choose from, where the reason is a class or an option that there is not."""
    if "is not accepted" in attempt.reason and attempt.classes:
        module, _, name = attempt.classes[-1].rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
        return f"; {name} has {', '.join(inspect.signature(cls).parameters)}" if cls else ""
    key = ".".join(attempt.keys).rpartition(".")[2]
    if not re.search("import path|has no attribute|No module|to be a subclass", attempt.reason):
        return ""
    if key == "norm":
        return "; known classes: torch.nn.LayerNorm, torch.nn.RMSNorm"
    if {"plan", "plans"} & set(attempt.keys):
        key = "expert_selection"
    return f"; known classes: {', '.join(sorted(_concrete(_BASES[key])))}" if key in _BASES else ""


def _concrete(base: type) -> set[str]:
    names: set[str] = set()
    cls: type
    for cls in base.__subclasses__():
        if not cls.__name__.startswith("_") and not inspect.isabstract(cls):
            names.add(cls.__name__)
        names |= _concrete(cls)
    return names

"""How a plan reaches the routed layers of any model, and how their routings come back.

A model whose `forward` belongs to somebody else hands no selections down and no routings up. So a
routed layer asks here, when it is called, whether a plan or a record is open. Both belong to the
thread that opened them and to the layers of one model; nothing is kept on a module. A `Decoder`,
which hands both itself, asks once and pins what it hands down.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_dsmoe.fork_safe_lock import ForkSafeLock
from lightning_dsmoe.routing.routing import MixtureOutput, Routing
from lightning_dsmoe.routing.selection import AllExperts, Selection
from lightning_dsmoe.torch_private import in_backward_pass, not_compiled

Layer = Any
"""A `RoutedLayer`, whose module imports this one."""


class Recorder(Protocol):
    """What is told of every routing."""

    def add(self, layer: Layer, routing: Routing, selection: Selection) -> None:
        """Take the routing of a call of a layer, if the layer is one of its own."""


@dataclass(frozen=True, eq=False)
class Scope:
    """What is open in a thread.

    Args:
        selections: selections by layer that hold instead of those which the layer is given.
        recorders: who is told of the routings.
        parts: what was opened one after the other, if this is all of it together.
    """

    selections: Mapping[Layer, Selection]
    recorders: tuple[Recorder, ...]
    parts: "tuple[Scope, ...]" = ()

    def selection(self, layer: Layer, given: Selection) -> Selection:
        """The selection that holds for a layer."""
        return self.selections.get(layer, given)

    def record(self, layer: Layer, routing: Routing | None, selection: Selection) -> None:
        """Tell all recorders of a routing."""
        if routing is not None and not in_backward_pass():
            for recorder in self.recorders:
                recorder.add(layer, routing, selection)


@dataclass(frozen=True)
class Pinned:
    """A selection that was asked for already; the layer runs it and tells nobody."""

    selection: Selection


is_open = False
"""Whether anything is open in any thread."""
_NOTHING = Scope({}, ())
_here: ContextVar[Scope] = ContextVar("scope", default=_NOTHING)
_everywhere: list[Scope] = []
_opening = ForkSafeLock()


@contextmanager
def opened(selections: Mapping[Layer, Selection], *recorders: Recorder) -> Iterator[None]:
    """Let selections hold for layers, and recorders be told, beside what is open in this thread."""
    global is_open
    part = Scope(selections, recorders)
    with _opening:
        _everywhere.append(part)
        is_open = True
    _here.set(_together((*_here.get().parts, part)))
    try:
        yield
    finally:
        # Not the scope from before: callbacks close theirs in the order in which they opened them.
        _here.set(_together(tuple(each for each in _here.get().parts if each is not part)))
        with _opening:
            _everywhere.remove(part)
            is_open = bool(_everywhere)


@contextmanager
def set_aside() -> Iterator[None]:
    """Let nothing that is open in this thread hold or be told, but for what the block opens."""
    outside = _here.get()
    _here.set(_NOTHING)
    try:
        yield
    finally:
        _here.set(outside)


def _together(parts: tuple[Scope, ...]) -> Scope:
    """What holds if these are open; of selections for one layer the last."""
    selections = {layer: each for part in parts for layer, each in part.selections.items()}
    return Scope(selections, tuple(each for part in parts for each in part.recorders), parts)


@not_compiled
def scope() -> Scope:
    """What is open in this thread."""
    return _here.get()


def is_pinned(args: tuple[Any, ...]) -> bool:
    """Whether the selection among a layer's arguments is pinned."""
    return len(args) > 1 and type(args[1]) is Pinned


def call(
    layer: Layer,
    run: Callable[..., MixtureOutput],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> MixtureOutput:
    """Call a routed layer with the selection that holds for it, and tell of its routing.

    Args:
        layer: the layer.
        run: what it does without anything open.
        args: its arguments: tokens and perhaps a selection, and others.
        kwargs: its keyword arguments.
    """
    if is_pinned(args):
        return run(args[0], args[1].selection, *args[2:], **kwargs)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return _call_uncompiled(layer, run, args, kwargs)
    # Exporting, which is done once, under what is open then; or not compiling, where asking for it
    # not to be compiled would take 40 us a call.
    return _call_in_scope(layer, run, args, kwargs)


def _call_in_scope(
    layer: Layer,
    run: Callable[..., MixtureOutput],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> MixtureOutput:
    place = _here.get()
    given = layer.wanted(selection_in(args, kwargs))
    if in_backward_pass():  # activation checkpointing runs the layer once more
        selection = _scope_of_recomputing(place, layer).selection(layer, given)
        args, kwargs = with_selection(args, kwargs, selection)
        return run(*args, **kwargs)
    selection = place.selection(layer, given)
    args, kwargs = with_selection(args, kwargs, selection)
    output = run(*args, **kwargs)
    place.record(layer, output.routing, selection)
    return output


def _scope_of_recomputing(place: Scope, layer: Layer) -> Scope:
    """What is open for a backward pass, whose own threads on a GPU have opened nothing."""
    # Python did not start those threads: so it knows them as dummies alone.
    if not isinstance(threading.current_thread(), threading._DummyThread):
        return place
    scopes = [each for each in reversed(_everywhere) if layer in each.selections]
    return scopes[0] if scopes else place


def selection_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Selection:
    """The selection among a layer's arguments, by name or the second; all experts without one."""
    given: Selection = args[1] if _is_second(args) else kwargs.get("selection", _ALL_EXPERTS)
    return given


def with_selection(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], selection: Selection
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with another selection."""
    if _is_second(args):
        return (args[0], selection, *args[2:]), dict(kwargs)
    return args, {**kwargs, "selection": selection}


def _is_second(args: tuple[Any, ...]) -> bool:
    # A layer of a user's own may have a mask there, and take its selection by name.
    return len(args) > 1 and not (args[1] is None or isinstance(args[1], Tensor))


_ALL_EXPERTS = AllExperts()  # made here, since torch.compile cannot trace the making of one


# The scope is found when a model runs, not when it is compiled. What the layer does is compiled.
_call_uncompiled = not_compiled(_call_in_scope, recursive=False)

"""What this library needs of torch that torch keeps to itself, all of it in one place.

Such a name may be missing from any version. Where something slower can take its place, with the
same result, one warning says so when this is imported; otherwise its use is an error of one line.
"""

import inspect
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from importlib import import_module
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

SEEN_IN = "2.10 to 2.15"
"""The versions of torch that have all that is needed."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _lacks(name: str) -> str:
    return f"torch {torch.__version__} has no torch.{name}, which {SEEN_IN} have"


def _optional(name: str, consequence: str) -> Any:
    """Something of torch, or None with a warning of what its absence means."""
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        warnings.warn(f"{_lacks(name)}: {consequence}", stacklevel=2)
        return None


def _needed(name: str) -> Any:
    """Something of torch, or an error."""
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        raise RuntimeError(_lacks(name)) from None


# `torch.compiler.disable` is public, but loads the compiler at once, which takes seconds of
# every import. Torch's own modules take this one, which loads it at the first call.
_disable_later = _optional("_compile._disable_dynamo", "importing takes some seconds longer")

# As `torch.utils.checkpoint` asks.
_graph_task = _optional("_C._current_graph_task_id", "layers take some microseconds longer")

# As `torch.autograd.Function.apply` asks.
_transforms_active = _optional(
    "_C._are_functorch_transforms_active", "all experts run on all tokens, in more memory"
)

# All of AOTInductor is private. Without it decoding runs uncompiled.
_COMPILE = "_inductor.aoti_compile_and_package"
_LOAD = "_inductor.aoti_load_package"
_RUN = "_C._aoti.AOTIModelPackageLoader.boxed_run"


def not_compiled(function: Callable[_P, _R], *, recursive: bool = True) -> Callable[_P, _R]:
    """Keep `torch.compile` out of a function, as `torch.compiler.disable` does.

    Args:
        function: the function.
        recursive: whether it is kept out of what the function calls, too.
    """
    disable = _disable_later or torch.compiler.disable
    disabled: Callable[_P, _R] = disable(function, recursive=recursive)
    return disabled


def in_backward_pass() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    if _graph_task is not None:
        return bool(_graph_task() != -1)
    # On a CPU, the thread that calls for the pass runs it. Python did not start the threads of
    # other devices: so it knows them as dummies alone.
    if isinstance(threading.current_thread(), threading._DummyThread):
        return True
    starts = (torch.autograd.backward.__code__, torch.autograd.grad.__code__)
    frame = inspect.currentframe()
    while frame is not None and frame.f_code not in starts:
        frame = frame.f_back
    return frame is not None


def in_function_transform() -> bool:
    """Whether this runs inside a transform of `torch.func`, such as `grad` or `vmap`.

    Where torch does not tell, yes: what a transform can take is right outside of them, too.
    """
    return _transforms_active is None or bool(_transforms_active())


def compile_ahead(program: ExportedProgram, package: BytesIO, options: dict[str, Any]) -> None:
    """Write a graph, compiled by AOTInductor, into a package that `load_compiled` can read.

    Raises:
        RuntimeError: if this version of torch cannot.
    """
    for name in (_LOAD, _RUN):  # what cannot be used is not worth compiling
        _needed(name)
    _needed(_COMPILE)(program, package_path=package, inductor_configs=options)


def load_compiled(path: Path, device_index: int) -> Callable[[list[Tensor]], list[Tensor]]:
    """Load a package of `compile_ahead` as a function of all inputs of the graph in one list.

    It empties the list and checks nothing; what torch itself returns would flatten its arguments at
    every call.

    Raises:
        RuntimeError: if this version of torch cannot.
    """
    _needed(_RUN)
    package = _needed(_LOAD)(str(path), device_index=device_index)
    run: Callable[[list[Tensor]], list[Tensor]] = package.loader.boxed_run
    return run


def attention_operators() -> list[tuple[Any, Any]]:
    """The operators of attention, on CPUs and GPUs, each with that of its backward pass."""
    found = []
    for kind in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
    ):
        name = f"ops.aten._scaled_dot_product_{kind}"
        consequence = "operations of this kind of attention are not counted"
        both = _optional(name, consequence), _optional(f"{name}_backward", consequence)
        if None not in both:
            found.append(both)
    return found


def vector_bits() -> int | None:
    """The width of vectors that Inductor is held to on a CPU; None for the widest that it finds."""
    config = _optional("_inductor.config", "kernels are taken to use the widest vectors of the CPU")
    bits: int | None = None if config is None else config.cpp.simdlen
    return bits


def default_store() -> Any:
    """The keys and values that all processes of the default group share.

    Raises:
        RuntimeError: if this version of torch does not give it.
    """
    return _needed("distributed.distributed_c10d._get_default_store")()


def fake_tensors() -> AbstractContextManager[Any]:
    """Make tensors that have a device, unlike those of "meta", but no values and no memory.

    Raises:
        RuntimeError: where torch has none.
    """
    with suppress(ImportError):  # then `_needed` says it
        import_module("torch._subclasses.fake_tensor")  # not loaded by torch itself
    mode: AbstractContextManager[Any] = _needed("_subclasses.fake_tensor.FakeTensorMode")()
    return mode

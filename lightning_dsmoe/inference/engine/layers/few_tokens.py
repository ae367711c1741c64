"""Feed-forward layers of any model on a few tokens, compiled as the decode step of a decoder is.

Shapes: N tokens, D width, E experts; leading dimensions of tokens that are called x are free.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.inference.engine.decode.aot_cache import Kernel, Part
from lightning_dsmoe.inference.engine.decode.compiled_step import (
    COMPILING,
    CannotCompile,
    NotReady,
    compiling,
)
from lightning_dsmoe.inference.engine.decode.gathered_layers import gather_feed_forward
from lightning_dsmoe.inference.engine.decode.kernel_source import KernelSource
from lightning_dsmoe.inference.engine.decode.same_graph import Known, Layout
from lightning_dsmoe.inference.engine.decode.selection_inputs import free_sizes, with_inputs
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.weights.matvec import materialize
from lightning_dsmoe.inference.engine.weights.row_major import as_row_major
from lightning_dsmoe.routing import MixtureOutput, Routing, Selection

MAX_TOKENS = 16
"""A kernel is unrolled over its tokens, of which more together leave fewer experts idle."""


def gather_tokens(layer: MixtureOfExperts, selection: Selection, x_ND: Tensor) -> MixtureOutput:
    """A packed layer on a few tokens, reading the active experts' weights only.

    Args:
        layer: the layer.
        selection: the experts that run.
        x_ND: tokens.
    """
    y_ND, routing = gather_feed_forward(layer, selection, materialize(x_ND))
    return MixtureOutput(y_ND.to(x_ND.dtype), routing)


def of_shape(x: Tensor, output: MixtureOutput) -> MixtureOutput:
    """The output for tokens `[N, D]` in the shape of tokens `[..., D]`."""
    logits, probs = (each.view(*x.shape[:-1], -1) for each in cast(Routing, output.routing))
    return MixtureOutput(output.output.view(x.shape), Routing(logits, probs))


class ExpertsStep(nn.Module):
    """A packed layer on a few tokens, in the form that is compiled.

    Args:
        layer: the layer.
        selection: the experts that run.
    """

    def __init__(self, layer: MixtureOfExperts, selection: Selection) -> None:
        super().__init__()
        self.layer = layer
        self.selection = selection

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[N, D]`, logits and probabilities `[N, E]`."""
        y_ND, routing = gather_tokens(self.layer, self.selection, x_ND)
        return y_ND, *cast(Routing, routing)


class _Compiled(NamedTuple):
    """A kernel, and where the weights of its layer are found at each call."""

    kernel: Kernel
    places: list[tuple[dict[str, Tensor], str]]
    layouts: list[Layout]


class FewTokens:
    """Runs packed layers of a model on a few tokens, compiled at the first use.

    Layers that differ in their weights alone share a kernel, which is kept on disk. Another process
    compiles it, and until it is there layers run uncompiled.

    Args:
        switch_points: `gather_up_to` tokens are few, on the CPU and at most 16.

    Attributes:
        waits: compile in this process, at once.
    """

    def __init__(self, switch_points: SwitchPoints) -> None:
        self.switch_points = switch_points
        self._compiled: dict[object, _Compiled | None] = {}
        self.waits = False
        self._source = KernelSource()
        self._refused: list[Known] = []
        self._warned = False

    def __call__(
        self, layer: MixtureOfExperts, selection: Selection, x: Tensor
    ) -> MixtureOutput | None:
        """Run a layer on tokens `[..., D]`; None if they are many, or it is not compiled."""
        n_tokens = x.shape[:-1].numel()
        few = 0 < n_tokens <= min(self.switch_points.gather_up_to, MAX_TOKENS)
        of_own_type = x.dtype == as_row_major(layer.experts.w_in).out_dtype
        if not (few and x.is_cpu and of_own_type and isinstance(selection, Selection)):
            return None
        x_ND = x.detach().reshape(n_tokens, -1).contiguous()
        key = layer, selection, n_tokens, x.dtype
        if (compiled := self._compiled.get(key)) is None:
            if key in self._compiled:
                return None
            compiled = self._compile(key, x_ND)
        if compiled is None:
            return None
        weights = [tensors[name] for tensors, name in compiled.places]
        if any(Layout.of(w) != layout for w, layout in zip(weights, compiled.layouts, strict=True)):
            self._compiled.pop(key, None)  # the layer was moved or changed
            return self(layer, selection, x)
        y_ND, *routing = compiled.kernel([x_ND, *weights])
        return of_shape(x, MixtureOutput(y_ND, Routing(*routing)))

    def forget_failures(self) -> None:
        """Compile what has failed once more when it is met."""
        self._compiled = {key: each for key, each in self._compiled.items() if each is not None}
        self._refused, self._warned = [], False

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: nothing compiled."""
        return {"switch_points": self.switch_points}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take that state."""
        self.__init__(**state)  # type: ignore[misc]

    def _compile(self, key: tuple[Any, ...], x_ND: Tensor) -> _Compiled | None:
        """Prepare a kernel; None if there is none, which `_compiled` holds if it is final."""
        layer, selection, n_tokens, _ = key
        if self._source.is_waiting(key) and not self.waits:
            return None
        if not COMPILING.acquire(blocking=self.waits):
            return None
        try:
            if key not in self._compiled:
                step = ExpertsStep(layer, with_inputs(selection, n_tokens))
                # Of inference tensors no graph can be traced, and the values do not matter.
                with torch.inference_mode(False):
                    example = torch.zeros_like(x_ND)
                part = Part(step, (example,), frozenset(), free_sizes(step))
                self._compiled[key] = self._made(key, part)
            return self._compiled[key]
        except NotReady:
            return None
        finally:
            COMPILING.release()

    def _made(self, key: tuple[Any, ...], part: Part) -> _Compiled | None:
        """The kernel of a part, and what it takes; None if it cannot be compiled."""
        (x_ND,), step = part.inputs, part.module
        if any(known.fits(part) for known in self._refused):
            return None
        what = "a layer for 1 token" if len(x_ND) == 1 else f"a layer for {len(x_ND)} tokens"
        try:
            with compiling():
                kernels = self._source.get(key, self.waits, {"layer": part}, what, x_ND.device)
        except CannotCompile as error:
            self._refused.append(Known.of(part, _no_kernel))
            if not self._warned:
                warnings.warn(
                    f"layers run uncompiled, more slowly: {error}; once that is mended, warm_up "
                    "compiles them, and so does a new process",
                    stacklevel=2,
                )
            self._warned = True
            return None
        places = _places(step)
        layouts = [Layout.of(tensors[name]) for tensors, name in places]
        return _Compiled(kernels["layer"], places, layouts)


def _no_kernel(inputs: list[Tensor]) -> list[Tensor]:
    raise NotImplementedError


def _places(module: nn.Module) -> list[tuple[dict[str, Tensor], str]]:
    """Where the tensors of `tensors_of` are found, so that a call sees those of its time."""
    kinds: tuple[tuple[Callable[[], Any], str], ...] = (
        (module.named_parameters, "_parameters"),
        (module.named_buffers, "_buffers"),
    )
    places = []
    for named, kind in kinds:
        for path, _ in named():
            owner, _, name = path.rpartition(".")
            places.append((getattr(module.get_submodule(owner), kind), name))
    return places

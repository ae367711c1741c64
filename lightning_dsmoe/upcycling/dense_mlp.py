"""The two-layer networks inside other models, recognised by what they compute.

No names and no classes are looked for: linear layers of fitting shapes are tried in every role
until one reading gives the module's own outputs. A multiplier, a clamp or an activation that is not
known gives others, so such a module is never mistaken for a plain one.

Shapes: U neurons, D width, N tokens.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import permutations
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.experts import Experts, FeedForward, GLUExperts, MLPExperts
from lightning_dsmoe.experts.experts import ACTIVATIONS
from lightning_dsmoe.routing import MixtureOutput

TOLERANCE = 1e-5
"""Of the largest output, between a module and its reading."""
_N_TOKENS = 8
_SCALES = (1.0, 4.0)
"""Of the projections: at small ones activations look alike, clamps are at large ones."""
_GRID = torch.linspace(-8, 8, 257)


class DenseMLP(NamedTuple):
    """What a two-layer network computes: y = w_out^T a(w_in x + b_in) + b_out, then dropout.

    Args:
        w_in: projection `[U, D]`; for a gated linear unit that of the gate, then that of up.
        w_out: output weights `[U, D]`, the transpose of a linear layer's.
        activation: name of the activation, one of `lightning_dsmoe.experts.ACTIVATIONS`.
        b_in: biases `[U]` of the projections, None for none.
        b_out: bias `[D]` of the output, None for none.
        dropout: probability with which an output is dropped in training.
        experts: class of the experts; None for `GLUExperts` after two projections, else
            `MLPExperts`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe.upcycling import DenseMLP
        >>> class SplitMLP(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weights = nn.ParameterList([torch.randn(32, 8), torch.randn(32, 8)])
        ...
        ...     def forward(self, x):
        ...         return (x @ self.weights[0].mT).relu() @ self.weights[1]
        >>> def find(name, module):
        ...     if isinstance(module, SplitMLP):
        ...         return DenseMLP((module.weights[0],), module.weights[1], "relu")
        >>> find("mlp", SplitMLP())(torch.randn(3, 8)).shape
        torch.Size([3, 8])
    """

    w_in: tuple[Tensor, ...]
    w_out: Tensor
    activation: str
    b_in: tuple[Tensor, ...] | None = None
    b_out: Tensor | None = None
    dropout: float = 0.0
    experts: type[Experts] | None = None

    @property
    def experts_class(self) -> type[Experts]:
        """The class of the experts."""
        return self.experts or (GLUExperts if len(self.w_in) == 2 else MLPExperts)

    def hidden(self, x_ND: Tensor) -> Tensor:
        """Hidden units `[N, U]` of tokens, before the output weights."""
        biases = self.b_in or (None,) * len(self.w_in)
        with torch.device("meta"):
            experts = self.experts_class(1, 1, 1, activation=self.activation)
        projected = [
            F.linear(x_ND, w.to(x_ND.dtype), None if b is None else b.to(x_ND.dtype))
            for w, b in zip(self.w_in, biases, strict=True)
        ]
        return experts.hidden(torch.cat(projected, -1))

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Outputs `[N, D]` of tokens, without dropout."""
        y_ND: Tensor = self.hidden(x_ND) @ self.w_out.to(x_ND.dtype)
        return y_ND if self.b_out is None else y_ND + self.b_out.to(x_ND.dtype)


Find = Callable[[str, nn.Module], DenseMLP | None]
"""Says what the module of a name computes; None for all that it does not know."""


def recognise(module: nn.Module) -> DenseMLP | None:
    """The reading of a module that gives its outputs; None if there is none.

    Args:
        module: any module; it is run on random tokens.
    """
    if isinstance(module, FeedForward):
        return _of_feed_forward(module)
    with torch.enable_grad():  # whose views know whether their weights are trained
        found = list(_readings(module))
    if not found:
        return None
    probe = Probe(module, found[0])
    return next((each for each in found if probe.fault(each) is None), None)


def looks_like_mlp(module: nn.Module) -> bool:
    """Whether a module has the linear layers of a two-layer network, and an activation."""
    return bool(_activations(module)) and next(iter(_readings(module)), None) is not None


class Probe:
    """Compares a module with what is said to be equal to it, in float32 on random tokens.

    Args:
        module: the module.
        mlp: a reading of it, whose projections say how large the tokens have to be.
    """

    def __init__(self, module: nn.Module, mlp: DenseMLP) -> None:
        width, device = mlp.w_in[0].shape[1], mlp.w_in[0].device
        generator = torch.Generator().manual_seed(0)
        x_ND = torch.randn(_N_TOKENS, width, generator=generator).to(device)
        size = float((x_ND @ mlp.w_in[0].detach().float().mT).square().mean().sqrt()) or 1.0
        self.x_ND = torch.cat([x_ND * (scale / size) for scale in _SCALES])
        self._error: Exception | None = None
        try:  # once, as the copy in float32 is larger than the module and is not kept
            self._expected_ND, self._trained_ND = self._outputs(module)
        except Exception as error:  # a module of unknown code may raise anything
            self._error = error

    @torch.no_grad()
    def fault(self, reading: DenseMLP | nn.Module) -> str | None:
        """How the outputs differ from the module's, None if they do not."""
        try:
            if self._error is not None:
                raise self._error
            expected_ND = self._expected_ND
            if isinstance(reading, nn.Module):
                found_ND, _ = self._outputs(reading)
            else:
                found_ND = reading(self.x_ND)
            gap = float((found_ND - expected_ND).abs().max() / expected_ND.abs().max())
        except Exception as error:
            return f"it cannot run on tokens alone: {type(error).__name__}: {error}"[:200]
        if not expected_ND.any():
            return "its outputs are all zero, so that nothing can be compared"
        if not gap <= TOLERANCE:
            return f"its outputs differ from those of a plain one by {gap:.1e} of the largest"
        return self._fault_in_training(reading) if isinstance(reading, DenseMLP) else None

    @torch.no_grad()
    def _outputs(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Outputs of a module in float32, in evaluation and in training with a seed."""
        copied = deepcopy(module).float()
        evaluated_ND = self._output(copied.eval())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return evaluated_ND, self._output(copied.train())

    def _output(self, module: nn.Module) -> Tensor:
        output = module(self.x_ND[None])
        tensor: Tensor = output.output if isinstance(output, MixtureOutput) else output
        return tensor[0]

    def _fault_in_training(self, mlp: DenseMLP) -> str | None:
        """Whether the module drops other values in training than its outputs."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found_ND = F.dropout(mlp(self.x_ND)[None], mlp.dropout)[0]
        tolerance = float(TOLERANCE * self._trained_ND.abs().max())
        if torch.allclose(found_ND, self._trained_ND, atol=tolerance):
            return None
        return "in training it is random in another way than by dropout of its output"


def _of_feed_forward(layer: FeedForward) -> DenseMLP:
    experts = layer.experts
    w_in = rearrange(experts.w_in.weight, "1 (r u) d -> r u d", r=experts.projections_per_unit)
    b_in = experts.b_in
    return DenseMLP(
        w_in.unbind(),
        experts.w_out.weight[0],
        experts.activation,
        None if b_in is None else b_in.view(experts.projections_per_unit, -1).unbind(),
        experts.b_out,
        experts=type(experts),
    )


class _Linear(NamedTuple):
    """A linear layer as y = weight x + bias, weight `[outputs, inputs]`."""

    weight: Tensor
    bias: Tensor | None


def _readings(module: nn.Module) -> Iterator[DenseMLP]:
    """What a module may compute, by the shapes of its linear layers; likely ones first."""
    children = list(module.children())
    linears = [each for child in children if (each := _linear(child)) is not None]
    others = [child for child in children if _linear(child) is None]
    if len(linears) not in (2, 3) or any(True for each in others for _ in each.parameters()):
        return
    if any(True for _ in module.parameters(recurse=False)):
        return
    dropouts = [child.p for child in others if isinstance(child, nn.Dropout) and child.p > 0]
    if len(dropouts) > 1:
        return
    names = _activations(module) or list(ACTIVATIONS)
    for order in permutations(linears):
        *before, last = order
        width, n_neurons = last.weight.shape
        choices: list[tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]]
        if len(before) == 1 and before[0].weight.shape == (2 * n_neurons, width):
            halves = before[0].weight.chunk(2)
            bias = before[0].bias
            b_halves = (None, None) if bias is None else bias.chunk(2)
            choices = [(halves, b_halves), (halves[::-1], b_halves[::-1])]
        elif all(each.weight.shape == (n_neurons, width) for each in before):
            choices = [(tuple(e.weight for e in before), tuple(e.bias for e in before))]
        else:
            continue
        for w_in, b_in in choices:
            for name in names:
                yield DenseMLP(
                    w_in,
                    last.weight.mT,
                    name,
                    _together(w_in, b_in),
                    last.bias,
                    sum(dropouts),
                )


def _together(
    w_in: tuple[Tensor, ...], b_in: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...] | None:
    """Biases of all projections or of none; zeros beside those of another projection."""
    if all(bias is None for bias in b_in):
        return None
    return tuple(
        w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(w_in, b_in, strict=True)
    )


def _linear(module: nn.Module) -> _Linear | None:
    if hasattr(module, "parametrizations") or module._forward_hooks or module._forward_pre_hooks:
        return None
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        is_plain = weight.shape == (module.out_features, module.in_features)
        return _Linear(weight, bias) if is_plain else None
    # GPT-2's linear layer, whose weights are `[inputs, outputs]`.
    return _Linear(weight.mT, bias) if type(module).__name__ == "Conv1D" else None


def _activations(module: nn.Module) -> list[str]:
    """Names of the activation functions that a module has as children or attributes."""
    children = [c for c in module.children() if _linear(c) is None]
    candidates = [*children, *(v for v in vars(module).values() if callable(v))]
    names = [name for each in candidates if (name := activation_name(each)) is not None]
    return list(dict.fromkeys(names))


@torch.no_grad()
def activation_name(function: Callable[..., object]) -> str | None:
    """Our name of an activation function, by its values; None if it is none that is known.

    Examples:
        >>> from torch import nn
        >>> activation_name(nn.GELU(approximate="tanh"))
        'gelu_tanh'
    """
    if isinstance(function, type | nn.Dropout | nn.Identity):
        return None
    with torch.device("meta"):
        ours = {name: MLPExperts(1, 1, 1, activation=name) for name in ACTIVATIONS}
    try:
        values = function(_GRID)
    except Exception:  # what an attribute does when it is called is not known
        return None
    if not isinstance(values, Tensor) or values.shape != _GRID.shape:
        return None
    for name, experts in ours.items():
        if torch.allclose(experts.activate(_GRID), values.float().cpu(), atol=1e-6, rtol=1e-6):
            return name
    return None

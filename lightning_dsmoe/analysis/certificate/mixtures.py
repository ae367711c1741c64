"""What a plan drops in each mixture, how that changes its output, and a bound on the change.

For a token x a mixture gives y = c sum_e S_e e_e(x) with all experts and y' = c sum_e w_e e_e(x)
under a selection, with w the gates that remain. By the triangle inequality

    |y' - y| <= c sum_e |w_e - S_e| |e_e(x)|

which for raw gates sums over the dropped experts alone, c sum S_e |e_e(x)|. Both sides are divided
by |y|, shared experts and output biases included, which no plan changes. The bound holds up to
rounding, for one mixture on the inputs that it gets under the plan; what later layers make of an
error is not in it. Experts that were removed from a mixture are in neither sum.

Shapes: N tokens of any shape, D model width, E experts, R of them that remain.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_dsmoe.analysis.measured import evaluating
from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.attention.attention import attention_scope
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.inference.engine.layers.packed_layers import (
    PackedMixtureOfAttentionHeads,
    PackedMixtureOfExperts,
)
from lightning_dsmoe.precision import at_least_float32
from lightning_dsmoe.routing import (
    AllExperts,
    MixtureOutput,
    RoutedLayer,
    Selection,
    SelectionPlan,
    run_plan,
)
from lightning_dsmoe.routing.interception import selection_in, with_selection
from lightning_dsmoe.routing.removed import select
from lightning_dsmoe.routing.running import some_routed_layers


class TokenErrors(NamedTuple):
    """A mixture under a selection, token by token.

    Shape:
        dropped_mass: `[N]`, gate mass of the remaining experts that do not run.
        error: `[N]`, |y' - y| / |y|.
        bound: `[N]`, what the error cannot exceed.
    """

    dropped_mass: Tensor
    error: Tensor
    bound: Tensor


class MixtureErrors(NamedTuple):
    """Mean and maximum over the tokens of a text, of each of `TokenErrors`."""

    dropped_mass_mean: float
    dropped_mass_max: float
    error_mean: float
    error_max: float
    bound_mean: float
    bound_max: float


@torch.no_grad()
def token_errors(
    model: nn.Module, plan: SelectionPlan, run: Callable[[], object]
) -> dict[str, TokenErrors]:
    """Run a model under a plan, and each routed layer that it calls also with all experts.

    A layer runs again with the arguments of the call, whatever they are besides its tokens.

    Args:
        model: any model with routed layers, packed or not.
        plan: the experts that run.
        run: calls the model.

    Returns:
        The errors of each layer that was called, by name; those of several calls one after another.

    Raises:
        ValueError: if the model has no routed layer, the plan does not fit it, or a layer is called
            with a KV cache, to which it would add its tokens again.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly, SelectionPlan, TopK
        >>> model = nn.Sequential(nn.Linear(4, 8), OutputOnly(MixtureOfExperts(8, 4, 16)))
        >>> x = torch.randn(5, 4)
        >>> errors = token_errors(model, SelectionPlan(experts=TopK(2)), lambda: model(x))
        >>> bool((errors["1.layer"].error <= errors["1.layer"].bound * 1.001).all())
        True
    """
    calls: dict[str, list[TokenErrors]] = {}
    with evaluating(model), run_plan(model, plan), _after_calls(model, calls):
        run()
    return {
        name: TokenErrors(*(torch.cat(parts) for parts in zip(*calls[name], strict=True)))
        for name in some_routed_layers("a plan", model)
        if name in calls
    }


class ErrorTotals:
    """Token errors of one mixture, accumulated over batches."""

    def __init__(self) -> None:
        self._sum = torch.zeros(len(TokenErrors._fields), dtype=torch.float64)
        self._most = torch.zeros(len(TokenErrors._fields), dtype=torch.float64)
        self._tokens = 0

    def add(self, errors: TokenErrors, mask: Tensor | None) -> None:
        """Add a batch, of which the tokens in a bool mask count; None counts all.

        Raises:
            ValueError: if the mask is not of the tokens of a call, nor of several ones'.
        """
        rows_3N = torch.stack(errors)
        if mask is not None:
            n_calls, others = divmod(rows_3N.shape[1], max(mask.numel(), 1))
            if others:
                raise ValueError(f"a mask of {mask.numel()} tokens, errors of {rows_3N.shape[1]}")
            rows_3N = rows_3N[:, mask.bool().flatten().repeat(n_calls)]
        counted = rows_3N.double().cpu()
        if counted.numel():
            self._sum += counted.sum(-1)
            self._most = self._most.maximum(counted.amax(-1))
        self._tokens += counted.shape[-1]

    def compute(self) -> MixtureErrors:
        """Mean and maximum of each over tokens; 0 without tokens."""
        means = (self._sum / max(self._tokens, 1)).tolist()
        pairs = zip(means, self._most.tolist(), strict=True)
        return MixtureErrors(*(number for pair in pairs for number in pair))


@contextmanager
def _after_calls(model: nn.Module, calls: dict[str, list[TokenErrors]]) -> Iterator[None]:
    """Keep the errors of each call of a routed layer."""

    def keep(name: str) -> Callable[..., None]:
        def hook(
            layer: RoutedLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: MixtureOutput
        ) -> None:
            selection = selection_in(args, kwargs)  # that of the plan, which is open
            if kwargs.get("cache") is not None:
                raise ValueError(
                    f"errors are measured without KV caches, but {name} is called with one"
                )

            def again(selection: Selection) -> Tensor:
                # Not as a module: neither the plan nor this hook is meant.
                positional, named = with_selection(args, kwargs, selection)
                output: Tensor = layer.forward(*positional, **named).output
                return output

            contribution = _contribution(layer, args, kwargs, again)
            calls.setdefault(name, []).append(_errors(layer, selection, out, again, contribution))

        return hook

    handles = [
        layer.register_forward_hook(keep(name), with_kwargs=True)
        for name, layer in some_routed_layers("a plan", model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class _GivenGates(Selection):
    """Runs experts under gates, of any sign, in which the router has no say.

    Args:
        gates_NR: the gates of the experts that remain.
        remaining: their numbers; None for all.
    """

    gates_NR: Tensor
    remaining: Tensor | None

    def mask(self, probs: Tensor) -> Tensor:
        """Those with a gate."""
        places = slice(None) if self.remaining is None else self.remaining
        running_NE = torch.zeros_like(probs, dtype=torch.bool)
        running_NE[..., places] = self.gates_NR != 0
        return running_NE

    def weigh(self, probs: Tensor, active: Tensor) -> Tensor:
        """The gates."""
        return self.gates_NR


Contribution = Callable[[Tensor], Tensor]
"""From gates `[N, R]` to the sum of the outputs of experts under them, `[N, D]`."""


def _contribution(
    layer: RoutedLayer,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    again: Callable[..., Tensor],
) -> Contribution:
    """Outputs of a layer's experts, and of those with a gate other than 0 alone where it is known.

    A whole call of a layer for each of 32 experts takes many times as long as the experts do.
    """
    forward, x = type(layer).forward, args[0] if args else kwargs["x"]
    if isinstance(layer, MixtureOfExperts) and forward in _FEED_FORWARD:
        return partial(_of_experts, layer, x)
    if isinstance(layer, MixtureOfAttentionHeads) and forward in _ATTENTION:
        return _of_heads(layer, x, kwargs.get("mask"))

    def of_calls(gates_NR: Tensor) -> Tensor:
        # What runs at no gate, such as biases and shared experts, is no contribution.
        with_gates, without = (
            again(_GivenGates(gates, layer.remaining))
            for gates in (gates_NR, torch.zeros_like(gates_NR))
        )
        return with_gates - without

    return of_calls


_FEED_FORWARD = (MixtureOfExperts.forward, PackedMixtureOfExperts.forward)
_ATTENTION = (MixtureOfAttentionHeads.forward, PackedMixtureOfAttentionHeads.forward)
"""Of layers that do what is known here: a subclass may have a forward that does something else."""


def _of_experts(layer: MixtureOfExperts, x: Tensor, gates_NR: Tensor) -> Tensor:
    gates = (layer.gate_factor * gates_NR).reshape(-1, gates_NR.shape[-1])
    experts = layer.experts
    y = experts.sparse_forward(x.reshape(len(gates), -1), gates, gates != 0)
    return (y if experts.b_out is None else y - experts.b_out).view_as(x)


def _of_heads(layer: MixtureOfAttentionHeads, x_BTD: Tensor, mask: Tensor | None) -> Contribution:
    heads, scope = layer.heads, attention_scope(x_BTD, mask, None, causal=layer.causal)
    attended = x_BTD, scope, *heads.keys_and_values(x_BTD, scope, None, mask)

    def of_gates(gates_BTR: Tensor) -> Tensor:
        y = heads.sparse_forward(*attended, layer.gate_factor * gates_BTR, gates_BTR != 0)
        return y if heads.b_o is None else y - heads.b_o

    return of_gates


def _errors(
    layer: RoutedLayer,
    selection: Selection,
    sparse: MixtureOutput,
    again: Callable[..., Tensor],
    contribution: Contribution,
) -> TokenErrors:
    routing, remaining = sparse.routing, layer.remaining
    if routing is None:
        raise TypeError(f"{type(layer).__name__} returns no routing, as a routed layer has to")
    gates = select(selection, routing, remaining)
    dense_NR = select(AllExperts(), routing, remaining).weight
    change_NR = gates.weight - dense_NR
    bound_N = change_NR.new_zeros(change_NR.shape[:-1], dtype=torch.float64)
    # One expert at a time: the outputs of all would be E times as large as those of a layer.
    for expert in range(change_NR.shape[-1]):
        only_NR = torch.zeros_like(change_NR)
        only_NR[..., expert] = change_NR[..., expert]
        if only_NR.any():
            bound_N += _norm(contribution(only_NR))
    dense_ND = again(AllExperts())
    size_N = _norm(dense_ND).clamp_min(torch.finfo(torch.float32).tiny)
    dropped_N = dense_NR.masked_fill(gates.active, 0.0).sum(-1)
    error_N = _norm(sparse.output - dense_ND) / size_N
    return TokenErrors(*(each.flatten() for each in (dropped_N, error_N, bound_N / size_N)))


def _norm(x_ND: Tensor) -> Tensor:
    norm_N: Tensor = torch.linalg.vector_norm(at_least_float32(x_ND), dim=-1)
    return norm_N.double()

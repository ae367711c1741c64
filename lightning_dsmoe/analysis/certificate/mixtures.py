"""What a plan drops in each mixture, how that changes its output, and a bound on the change.

For a token x a mixture gives y = c sum_e S_e e_e(x) with all experts and y' = c sum_e w_e e_e(x)
under a selection, with w the gates that remain. By the triangle inequality

    |y' - y| <= c sum_e |w_e - S_e| |e_e(x)|

which for raw gates sums over the dropped experts alone, c sum S_e |e_e(x)|. Both sides are divided
by |y|, shared experts and output biases included, which no plan changes. The bound holds up to
rounding, for one mixture on the inputs that it gets under the plan; what later layers make of an
error is not in it. Experts that were removed from a mixture are in neither sum.

Shapes: B sequences in a batch, T positions, N tokens, D model width, E experts.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.attention.attention import causal_scope
from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.precision import at_least_float32
from lightning_dsmoe.routing import AllExperts, MixtureOutput, Selection, SelectionPlan
from lightning_dsmoe.routing.removed import select

Part = Callable[[Tensor, Tensor], Tensor]
"""From gates `[B, T, E]` and the experts that run to the sum of their outputs `[B, T, D]`."""


class TokenErrors(NamedTuple):
    """A mixture under a selection, token by token.

    Shape:
        dropped_mass: `[B, T]`, gate mass of the remaining experts that do not run.
        error: `[B, T]`, |y' - y| / |y|.
        bound: `[B, T]`, what the error cannot exceed.
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


class DecoderErrors(NamedTuple):
    """The mixtures of every layer, token by token; None for a layer that is not a mixture."""

    experts: list[TokenErrors | None]
    attention: list[TokenErrors | None]


@torch.inference_mode()
def token_errors(decoder: Decoder, tokens_BT: Tensor, plan: SelectionPlan) -> DecoderErrors:
    """Run a decoder under a plan, and each of its mixtures also with all experts.

    Args:
        decoder: the decoder, packed or not.
        tokens_BT: tokens.
        plan: the experts that run.
    """
    x_BTD = decoder.embed(tokens_BT)
    errors = DecoderErrors([], [])
    for layer, block in enumerate(cast(Iterable[Block], decoder.blocks)):
        for mixture, norm, selection, layers in (
            (block.attention, block.attention_norm, plan.attention[layer], errors.attention),
            (block.feed_forward, block.feed_forward_norm, plan.experts[layer], errors.experts),
        ):
            seen_BTD = norm(x_BTD)
            sparse: MixtureOutput = mixture(seen_BTD, selection)
            layers.append(_errors(mixture, seen_BTD, selection, sparse))
            x_BTD = x_BTD + sparse.output
    return errors


class ErrorTotals:
    """Token errors of one mixture, accumulated over batches."""

    def __init__(self) -> None:
        self._sum = torch.zeros(len(TokenErrors._fields), dtype=torch.float64)
        self._most = torch.zeros(len(TokenErrors._fields), dtype=torch.float64)
        self._tokens = 0

    def add(self, errors: TokenErrors, mask_BT: Tensor) -> None:
        """Add a batch, of which the tokens in a bool mask `[B, T]` count."""
        counted = torch.stack(errors)[:, mask_BT].double().cpu()
        if counted.numel():
            self._sum += counted.sum(-1)
            self._most = self._most.maximum(counted.amax(-1))
        self._tokens += counted.shape[-1]

    def compute(self) -> MixtureErrors:
        """Mean and maximum of each over tokens; 0 without tokens."""
        means = (self._sum / max(self._tokens, 1)).tolist()
        pairs = zip(means, self._most.tolist(), strict=True)
        return MixtureErrors(*(number for pair in pairs for number in pair))


def _errors(
    mixture: nn.Module, x_BTD: Tensor, selection: Selection, sparse: MixtureOutput
) -> TokenErrors | None:
    if sparse.routing is None:
        return None
    if isinstance(mixture, MixtureOfExperts):
        part: Part = partial(_expert_part, mixture, x_BTD)
    elif isinstance(mixture, MixtureOfAttentionHeads):
        part = _head_part(mixture, x_BTD)
    else:
        return None
    gates = select(selection, sparse.routing, mixture.remaining)
    dense_BTE = select(AllExperts(), sparse.routing, mixture.remaining).weight
    change_BTE = mixture.gate_factor * (gates.weight - dense_BTE)
    # One expert at a time: the outputs of all would be E times as large as those of a layer.
    bound_BT = change_BTE.new_zeros(change_BTE.shape[:-1], dtype=torch.float64)
    for expert in range(change_BTE.shape[-1]):
        only_BTE = torch.zeros_like(change_BTE, dtype=torch.bool)
        only_BTE[..., expert] = change_BTE[..., expert] != 0
        if only_BTE.any():
            bound_BT += _norm(part(change_BTE, only_BTE))
    dense_BTD = mixture(x_BTD).output
    size_BT = _norm(dense_BTD).clamp_min(torch.finfo(torch.float32).tiny)
    return TokenErrors(
        dense_BTE.masked_fill(gates.active, 0.0).sum(-1),
        _norm(sparse.output - dense_BTD) / size_BT,
        bound_BT / size_BT,
    )


def _expert_part(
    mixture: MixtureOfExperts, x_BTD: Tensor, gates_BTE: Tensor, active_BTE: Tensor
) -> Tensor:
    """Some experts of each token under gates, without the output bias: `[B, T, D]`."""
    experts = mixture.experts
    tokens = (rearrange(part, "b t d -> (b t) d") for part in (x_BTD, gates_BTE, active_BTE))
    y_ND = experts.sparse_forward(*tokens)
    return (y_ND if experts.b_out is None else y_ND - experts.b_out).view_as(x_BTD)


def _head_part(mixture: MixtureOfAttentionHeads, x_BTD: Tensor) -> Part:
    """The same for groups of heads."""
    heads, scope = mixture.heads, causal_scope(x_BTD, None, None)
    keys, values = heads.keys_and_values(x_BTD, scope, None, None)

    def part(gates_BTE: Tensor, active_BTE: Tensor) -> Tensor:
        y_BTD = heads.sparse_forward(x_BTD, scope, keys, values, gates_BTE, active_BTE)
        return y_BTD if heads.b_o is None else y_BTD - heads.b_o

    return part


def _norm(x_BTD: Tensor) -> Tensor:
    norm_BT: Tensor = torch.linalg.vector_norm(at_least_float32(x_BTD), dim=-1)
    return norm_BT.double()

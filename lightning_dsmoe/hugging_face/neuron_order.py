"""Which neurons of a split feed-forward layer are in which expert, after it was split in order.

Shapes: N tokens, D width, E experts, F neurons of one expert, U = E F neurons, n projections of a
neuron.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import Experts
from lightning_dsmoe.experts.neuron_split import by_activations, by_weights
from lightning_dsmoe.hugging_face.families.naming import blocks_of

MAX_TOKENS = 2048
"""Whose activations are looked at."""


@torch.no_grad()
def split_by_weights(decoder: Decoder) -> None:
    """Put neurons with similar input weights together, in every layer, in place."""
    for experts in _experts_of(decoder):
        n = experts.projections_per_unit
        w_in_UP = rearrange(experts.w_in.weight, "e (n f) d -> (e f) (n d)", n=n)
        reorder(experts, by_weights(w_in_UP, experts.n_experts))


@torch.no_grad()
def split_by_activations(decoder: Decoder, tokens_BT: Tensor) -> None:
    """Put neurons that are active for the same tokens together, in every layer, in place.

    Args:
        decoder: whose experts all run.
        tokens_BT: a sample text; its first 2,048 tokens count.
    """
    inputs: dict[nn.Module, Tensor] = {}

    def keep(experts: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[experts] = arguments[0]

    layers = _experts_of(decoder)
    hooks = [experts.register_forward_pre_hook(keep) for experts in layers]
    try:
        decoder(tokens_BT[: max(1, MAX_TOKENS // tokens_BT.shape[1]), :MAX_TOKENS])
    finally:
        for hook in hooks:
            hook.remove()
    for experts in layers:
        b_in = None if experts.b_in is None else experts.b_in.flatten()
        projected_NR = F.linear(inputs.pop(experts), experts.w_in.weight.flatten(0, 1), b_in)
        hidden_NEF = experts.hidden(
            rearrange(projected_NR, "n (e r) -> n e r", e=experts.n_experts)
        )
        contribution_NEF = hidden_NEF * experts.w_out.weight.norm(dim=-1)
        reorder(experts, by_activations(contribution_NEF.flatten(1).float(), experts.n_experts))


def reorder(experts: Experts, neurons_EF: Tensor) -> None:
    """Give each expert the neurons of these numbers, without a change of the sum of all experts.

    Args:
        experts: of one layer, changed in place.
        neurons_EF: numbers from 0 to U - 1, each once.
    """
    n, order_U = experts.projections_per_unit, neurons_EF.flatten()
    for weight, projections in (
        (experts.w_in.weight, n),
        (experts.w_out.weight, 1),
        (experts.b_in, n),
    ):
        if weight is not None:
            rows = rearrange(weight.data, "e (n f) ... -> (e f) n ...", n=projections)[order_U]
            ordered = rearrange(rows, "(e f) n ... -> e (n f) ...", e=experts.n_experts)
            weight.data = ordered.contiguous()


def _experts_of(decoder: Decoder) -> list[Experts]:
    """The experts of all mixtures of a decoder."""
    found = (getattr(block.feed_forward, "experts", None) for block in blocks_of(decoder))
    return [experts for experts in found if isinstance(experts, Experts)]

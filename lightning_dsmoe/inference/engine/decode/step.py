"""One new token of each of a few sequences, through the parts of a decoder.

Shapes: T sequences, one new token of each; D width, H KV heads, S tokens in the cache, C head
width, V vocabulary.
"""

from typing import cast

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.attention.rotary import Rotation, rotation
from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts
from lightning_dsmoe.inference.engine.decode.expert_choice import ChosenExperts, choose_experts
from lightning_dsmoe.inference.engine.decode.gathered_layers import (
    LayerSlots,
    gather_experts,
    gather_heads,
)
from lightning_dsmoe.inference.engine.weights.int8_head import Int8Head
from lightning_dsmoe.inference.engine.weights.matvec import materialize, with_matvec_linears
from lightning_dsmoe.routing import AllExperts, Selection

_ATTENTION = (GroupedQueryAttention, MixtureOfAttentionHeads)
_FEED_FORWARD = (FeedForward, MixtureOfExperts)


class EmbedStep(nn.Module):
    """Embeds tokens and turns their positions into angles.

    Args:
        decoder: the decoder.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.embedding = decoder.embedding
        self.positions = decoder.positions
        layer = cast(GroupedQueryAttention, cast(Block, decoder.blocks[0]).attention)
        self.d_head, self.rope_theta = layer.d_head, layer.rope_theta

    def forward(self, tokens_T: Tensor, seen_ST: Tensor) -> tuple[Tensor, ...]:
        """The tokens `[T, D]`, and with rotary positions a `Rotation` of `[T, 1, C]`."""
        positions_T = materialize(seen_ST.sum(0) - 1)
        x_TD = self.embedding(tokens_T)
        if self.positions is not None:
            x_TD = x_TD + self.positions(positions_T)
        if self.rope_theta is None:
            return (x_TD,)
        return (x_TD, *rotation(positions_T[:, None], self.d_head, self.rope_theta))


class BlockStep(nn.Module):
    """Runs one block under selections.

    Args:
        block: the block, whose layers are the library's own.
        experts: its selection of feed-forward experts.
        attention: its selection of attention experts.

    Raises:
        TypeError: if a layer is of another class.
    """

    def __init__(self, block: Block, experts: Selection, attention: Selection) -> None:
        super().__init__()
        for layer, known in ((block.attention, _ATTENTION), (block.feed_forward, _FEED_FORWARD)):
            if type(layer) not in known:
                raise TypeError(f"a {type(layer).__name__} has no decode step of its own")
        self.block = block
        self.experts = experts
        self.attention = attention

    def forward(
        self,
        x_TD: Tensor,
        keys_STHC: Tensor,
        values_STHC: Tensor,
        seen_ST: Tensor,
        at_1: Tensor,
        *by: Tensor,
    ) -> Tensor:
        """Transform tokens `[T, D]`, whose keys and values are written to a cache."""
        slots = LayerSlots(keys_STHC, values_STHC, seen_ST, at_1)
        attention = cast(MixtureOfAttentionHeads, self.block.attention)
        normed_TD = materialize(self.block.attention_norm(x_TD))
        choice = _choice(attention, self.attention, normed_TD)
        rotation_by = Rotation(*by) if by else None
        attended_TD = gather_heads(attention.heads, normed_TD, choice, rotation_by, slots)
        x_TD = materialize(x_TD + attended_TD.to(x_TD.dtype))
        fed_TD = self._feed_forward(materialize(self.block.feed_forward_norm(x_TD)))
        return materialize(x_TD + fed_TD.to(x_TD.dtype))

    def _feed_forward(self, x_TD: Tensor) -> Tensor:
        layer = cast(MixtureOfExperts, self.block.feed_forward)
        y_TD = gather_experts(layer.experts, x_TD, _choice(layer, self.experts, x_TD))
        if isinstance(layer, MixtureOfExperts) and layer.shared is not None:
            every = _choice(layer.shared, AllExperts(), x_TD)
            y_TD = y_TD + gather_experts(layer.shared.experts, x_TD, every)
        return y_TD


class PredictStep(nn.Module):
    """The last norm and the head.

    Args:
        decoder: the decoder.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.norm = decoder.norm
        self.head: nn.Module = decoder.head

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits `[T, V]`."""
        normed_TD = materialize(self.norm(x_TD))
        if isinstance(self.head, Int8Head):
            return self.head.matvec(normed_TD)
        logits_TV: Tensor = with_matvec_linears(self.head, normed_TD)
        return logits_TV


def _choice(layer: nn.Module, selection: Selection, x_TD: Tensor) -> ChosenExperts:
    if isinstance(layer, MixtureOfExperts | MixtureOfAttentionHeads):
        chosen = choose_experts(selection, with_matvec_linears(layer.router, x_TD), layer.remaining)
        return ChosenExperts(chosen.experts_K, chosen.gates_KT * layer.gate_factor)
    n_groups = layer.heads.n_groups if isinstance(layer, GroupedQueryAttention) else 1
    return ChosenExperts(None, torch.ones(n_groups, x_TD.shape[0], device=x_TD.device))

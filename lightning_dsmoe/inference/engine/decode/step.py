"""One new token of each of a few sequences, through the parts of a decoder.

What enters a matrix-vector product or a norm is materialized before it: see `materialize`.

Shapes: B sequences, one new token of each; D model width, H KV heads, S positions so far (slots of
the cache in use), C head width, V vocabulary.
"""

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.attention.rotary import Rotation, rotation
from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts
from lightning_dsmoe.inference.engine.decode.gathered_layers import (
    LayerSlots,
    choose,
    gather_feed_forward,
    gather_heads,
)
from lightning_dsmoe.inference.engine.weights.int8_head import Int8Head
from lightning_dsmoe.inference.engine.weights.matvec import materialize, with_matvec_linears
from lightning_dsmoe.routing import Selection

_ATTENTION = (GroupedQueryAttention, MixtureOfAttentionHeads)
_FEED_FORWARD = (FeedForward, MixtureOfExperts)


class EmbedStep(nn.Module):
    """Embeds tokens and turns their positions into angles, once for all blocks that share them.

    Args:
        decoder: the decoder.

    Attributes:
        angles_of: for each block the part of the angles that is its own.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.embedding = decoder.embedding
        self.positions = decoder.positions
        layers = [block.attention for block in cast(Iterable[Block], decoder.blocks)]
        # None also for layers of other classes, which have no decode step.
        rotary_of_blocks = [getattr(getattr(a, "heads", None), "rotary", None) for a in layers]
        self.rotaries = [each for each in dict.fromkeys(rotary_of_blocks) if each is not None]
        places = {each: slice(2 * at, 2 * at + 2) for at, each in enumerate(self.rotaries)}
        self.angles_of = [places.get(each, slice(0)) for each in rotary_of_blocks]

    def forward(self, tokens_B: Tensor, seen_SB: Tensor) -> tuple[Tensor, ...]:
        """The tokens `[B, D]`, and the `Rotation` of `[B, 1, R]` of each kind of heads."""
        positions_B = materialize(seen_SB.sum(0) - 1)
        x_BD = self.embedding(tokens_B)
        if self.positions is not None:
            x_BD = x_BD + self.positions(positions_B)
        rotations = [rotation(positions_B[:, None], *rotary) for rotary in self.rotaries]
        return (x_BD, *(angles for each in rotations for angles in each))


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
        # Exact classes: the `forward` of a subclass, which is not called here, may be another one.
        for layer, known in ((block.attention, _ATTENTION), (block.feed_forward, _FEED_FORWARD)):
            if type(layer) not in known:
                raise TypeError(f"a {type(layer).__name__} has no decode step of its own")
        self.block = block
        self.experts = experts
        self.attention = attention

    def forward(
        self,
        x_BD: Tensor,
        keys_SBHC: Tensor,
        values_SBHC: Tensor,
        seen_SB: Tensor,
        at_1: Tensor,
        *rotary: Tensor,
    ) -> Tensor:
        """Transform tokens `[B, D]`; their keys and values are written to slot `at_1`."""
        slots = LayerSlots(keys_SBHC, values_SBHC, seen_SB, at_1)
        attention = cast(MixtureOfAttentionHeads, self.block.attention)
        normed_BD = materialize(self.block.attention_norm(x_BD))
        _, chosen = choose(attention, self.attention, normed_BD)
        angles = Rotation(*rotary) if rotary else None
        attended_BD = gather_heads(attention.heads, normed_BD, chosen, angles, slots)
        x_BD = materialize(x_BD + attended_BD.to(x_BD.dtype))
        normed_BD = materialize(self.block.feed_forward_norm(x_BD))
        layer = cast(MixtureOfExperts, self.block.feed_forward)
        fed_BD = gather_feed_forward(layer, self.experts, normed_BD).output
        return materialize(x_BD + fed_BD.to(x_BD.dtype))


class PredictStep(nn.Module):
    """The last norm and the head.

    Args:
        decoder: the decoder.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.norm = decoder.norm
        self.head: nn.Module = decoder.head

    def forward(self, x_BD: Tensor) -> Tensor:
        """Logits `[B, V]`."""
        normed_BD = materialize(self.norm(x_BD))
        if isinstance(self.head, Int8Head):
            return self.head.matvec(normed_BD)
        logits_BV: Tensor = with_matvec_linears(self.head, normed_BD)
        return logits_BV

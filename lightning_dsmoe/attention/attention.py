"""The base of attention layers, and which tokens attend to which.

Shapes: B sequences in a batch, T new positions, S positions so far, D width.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention.kv_cache import KVCache
from lightning_dsmoe.routing import AllExperts, MixtureOutput, Selection
from lightning_dsmoe.token_shapes import check_sequences


class Attention(nn.Module, ABC):
    """Base of the attention layers of a decoder block, with or without routing.

    A subclass has `n_kv_heads` and `d_head`, the sizes of its KV cache.
    """

    n_kv_heads: int
    d_head: int

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        selection: Selection = AllExperts(),
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> MixtureOutput:
        """Causal self-attention over tokens `[B, T, D]`.

        Args:
            x: tokens; with a cache, those that follow the tokens in it.
            selection: the experts that run; a layer without a router ignores it.
            mask: bool `[B, T]`, false for padding (on the left); None for no padding.
            cache: keys and values of earlier tokens; the new ones are added to it.

        Returns:
            Tokens `[B, T, D]` and the routing, None without a router.
        """


class Scope(NamedTuple):
    """Which tokens attend to which.

    Shape:
        positions_BT: position of each new token, padding not counted; B may be 1.
        attend_BTS: bool, true where a new token attends to a token; None for the plain causal mask.
    """

    positions_BT: Tensor
    attend_BTS: Tensor | None


def causal_scope(x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Scope:
    """Positions and visibility of new tokens `[B, T, D]` after those in the cache.

    Padding attends to itself alone: a row without any key would be a softmax over nothing, NaN, and
    spread to the tokens through the next layer.

    Raises:
        ValueError: if the tokens are not sequences, or the mask is not theirs.
    """
    check_sequences(x, mask)
    batch, length, _ = x.shape
    steps = torch.arange(length, device=x.device)
    if mask is None and (cache is None or cache.length == 0):
        return Scope(steps[None], None)
    valid_BT = x.new_ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
    start = 0
    valid_BS = valid_BT
    if cache is not None:
        start = cache.length
        valid_BS = torch.cat([cache.valid[:, :start], valid_BT], dim=1)
    positions_BT = (valid_BS.cumsum(1) - 1).clamp_min(0)[:, start:]
    keys = torch.arange(start + length, device=x.device)
    queries = (start + steps)[:, None]
    attend_BTS = ((keys <= queries) & valid_BS[:, None, :]) | (keys == queries)
    return Scope(positions_BT, attend_BTS)

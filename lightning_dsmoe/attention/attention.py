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
    """Base of attention layers, with or without routing.

    A subclass has `n_kv_heads` and `d_head`, the sizes of its KV cache, and may set `causal` to
    false: then tokens attend to later ones too, and it has no cache.
    """

    n_kv_heads: int
    d_head: int
    causal: bool = True

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        selection: Selection = AllExperts(),
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> MixtureOutput:
        """Self-attention over tokens `[B, T, D]`.

        Args:
            x: tokens; with a cache, those that follow the tokens in it.
            selection: the experts that run; a layer without a router ignores it.
            mask: bool `[B, T]`, true for tokens and false for padding, on either side; None for no
                padding. Of PyTorch's, true for padding, `from_key_padding_mask` makes one.
            cache: keys and values of earlier tokens; the new ones are added to it.

        Returns:
            Tokens `[B, T, D]` and the routing, None without a router.
        """


class Scope(NamedTuple):
    """Which tokens attend to which.

    Shape:
        positions_BT: position of each new token, padding not counted; B may be 1.
        attend_BTS: bool, true where a new token attends to a token; None where nothing is hidden
            but, if `causal`, what comes later.
        causal: whether later tokens are hidden.
    """

    positions_BT: Tensor
    attend_BTS: Tensor | None
    causal: bool = True


def attention_scope(
    x: Tensor, mask: Tensor | None, cache: KVCache | None, *, causal: bool = True
) -> Scope:
    """Positions and visibility of new tokens `[B, T, D]` after those in the cache.

    Nothing attends to padding but padding to itself: a row without any key would be a softmax over
    nothing, NaN, and spread to the tokens through the next layer.

    Raises:
        ValueError: if the tokens are not sequences, the mask is not theirs, or there is a cache
            although later tokens are not hidden.
    """
    check_sequences(x, mask)
    if cache is not None and not causal:
        raise ValueError(
            "attention with causal=False has no KV cache: a token that is read later would change "
            "what earlier ones attend to; use causal=True or no cache"
        )
    batch, length, _ = x.shape
    steps = torch.arange(length, device=x.device)
    if mask is None and (cache is None or cache.length == 0):
        return Scope(steps[None], None, causal)
    valid_BT = x.new_ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
    start = 0
    valid_BS = valid_BT
    if cache is not None:
        start = cache.length
        valid_BS = torch.cat([cache.valid[:, :start], valid_BT], dim=1)
    positions_BT = (valid_BS.cumsum(1) - 1).clamp_min(0)[:, start:]
    keys = torch.arange(start + length, device=x.device)
    queries = (start + steps)[:, None]
    attend_BTS = valid_BS[:, None, :] | (keys == queries)
    if causal:
        attend_BTS = attend_BTS & (keys <= queries)
    return Scope(positions_BT, attend_BTS, causal)

"""Keys and values of the tokens seen so far.

Shapes: B sequences in a batch, H KV heads, S capacity, T new positions, C head width.
"""

from typing import Self

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one attention layer, preallocated and filled from the left.

    It does not depend on which experts run. A layer that is given a cache writes the new tokens
    into it, in place.

    Args:
        batch_size: sequences B.
        n_kv_heads: KV heads H.
        capacity: tokens S per sequence.
        d_head: head width C.
        device: where the cache lies.
        dtype: type of the keys and values.

    Raises:
        ValueError: on writing more tokens than fit.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe import GroupedQueryAttention
        >>> from lightning_dsmoe.attention import KVCache
        >>> attention = GroupedQueryAttention(64, 8, 2, 16)
        >>> cache = KVCache(1, 2, 32, 16)  # one sequence of up to 32 tokens
        >>> _ = attention(torch.randn(1, 5, 64), cache=cache)  # a prompt
        >>> _ = attention(torch.randn(1, 1, 64), cache=cache)  # the next token
        >>> cache.length
        6
    """

    def __init__(
        self,
        batch_size: int,
        n_kv_heads: int,
        capacity: int,
        d_head: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch_size, n_kv_heads, capacity, d_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.valid = torch.zeros(batch_size, capacity, device=device, dtype=torch.bool)
        self.length = 0

    @classmethod
    def over(cls, keys_BHSC: Tensor, values_BHSC: Tensor, valid_BS: Tensor) -> Self:
        """An empty cache over memory that the caller owns."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.valid = keys_BHSC, values_BHSC, valid_BS
        cache.length = 0
        return cache

    @property
    def capacity(self) -> int:
        """Tokens of one sequence that fit."""
        return self.keys.shape[2]

    def append(self, keys_BHTC: Tensor, values_BHTC: Tensor, valid_BT: Tensor) -> None:
        """Add tokens; those not valid are padding that nobody attends to."""
        end = self.length + keys_BHTC.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self.capacity}")
        self.keys[:, :, self.length : end] = keys_BHTC
        self.values[:, :, self.length : end] = values_BHTC
        self.valid[:, self.length : end] = valid_BT
        self.length = end

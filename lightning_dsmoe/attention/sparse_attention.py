"""Attention from some of the tokens only.

Shapes: B sequences in a batch, T new positions, S positions so far, N = B T tokens, H heads,
C head width, M the tokens that attend, P most of them in one sequence.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.attention.attention import Scope


def attend_of_tokens(scope: Scope, batch: int, length: int) -> Tensor:
    """Visibility of every key for each new token, bool `[N, S]`."""
    if scope.attend_BTS is not None:
        return scope.attend_BTS.flatten(0, 1)
    steps = torch.arange(length, device=scope.positions_BT.device)
    attend_TS = steps <= steps[:, None] if scope.causal else steps.new_ones(length, length).bool()
    return attend_TS.repeat(batch, 1)


def attend_some(
    q_HMC: Tensor, keys_BHSC: Tensor, values_BHSC: Tensor, row_M: Tensor, attend_MS: Tensor
) -> Tensor:
    """Attention of some tokens, each over the keys of its own sequence: `[M, H C]`.

    The queries are padded to the same number in every sequence, so that one call serves all;
    padding attends to every key, which keeps it finite, and its result is dropped.
    """
    batch, n_heads, length, d_head = keys_BHSC.shape
    counts_B = row_M.bincount(minlength=batch)
    slot_M = torch.arange(len(row_M), device=row_M.device) - (counts_B.cumsum(0) - counts_B)[row_M]
    most = int(counts_B.max())
    q_BPHC = q_HMC.new_zeros(batch, most, n_heads, d_head).index_put(
        (row_M, slot_M), rearrange(q_HMC, "h m c -> m h c")
    )
    attend_BPS = attend_MS.new_ones(batch, most, length)
    attend_BPS[row_M, slot_M] = attend_MS
    q_BHPC = rearrange(q_BPHC, "b p h c -> b h p c")
    heads_BHPC = F.scaled_dot_product_attention(
        q_BHPC, keys_BHSC, values_BHSC, attn_mask=attend_BPS[:, None]
    )
    return rearrange(heads_BHPC, "b h p c -> b p (h c)")[row_M, slot_M]

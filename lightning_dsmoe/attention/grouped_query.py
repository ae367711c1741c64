"""Plain grouped-query attention."""

import torch
from torch import Tensor

from lightning_dsmoe.attention.attention import Attention, attention_scope
from lightning_dsmoe.attention.head_groups import HeadGroups, QKNorm
from lightning_dsmoe.attention.kv_cache import KVCache
from lightning_dsmoe.attention.rope_scaling import RopeScaling
from lightning_dsmoe.placement import Device
from lightning_dsmoe.routing import AllExperts, MixtureOutput, Selection
from lightning_dsmoe.token_shapes import check_width


class GroupedQueryAttention(Attention):
    """Grouped-query attention: self-attention whose query heads share keys and values.

    With n_kv_heads = n_heads it is multi-head attention, with 1 multi-query (arXiv 2305.13245).

    Args:
        d_model: width D of the tokens.
        n_heads: query heads.
        n_kv_heads: key and value heads; a divisor of `n_heads`.
        d_head: head width.
        rope_theta: base of the rotary frequencies; None for no rotary positions.
        rope_scaling: changes those frequencies, as `Llama3RopeScaling` does; None for none.
        rotary_fraction: share of each head's channels that rotate, the first ones.
        qk_norm: whether queries and keys pass an RMSNorm over each head; "projection" is one over
            all heads together, as in OLMoE.
        norm_eps: epsilon of that norm; None for the smallest number of the type.
        bias: whether the projections have biases.
        output_bias: whether the projection of the output has one; None for as the others.
        causal: whether tokens attend to earlier ones alone, as in a decoder; false for encoders.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Raises:
        ValueError: if `n_kv_heads` does not divide `n_heads` or an option is out of range.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe import GroupedQueryAttention
        >>> attention = GroupedQueryAttention(64, 8, 2, 16)  # 8 query heads, 2 KV heads of width 16
        >>> attention(torch.randn(2, 10, 64)).output.shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        d_head: int,
        *,
        rope_theta: float | None = 10000.0,
        rope_scaling: RopeScaling | None = None,
        rotary_fraction: float = 1.0,
        qk_norm: QKNorm = False,
        norm_eps: float | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        causal: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads, got n_heads={n_heads}, n_kv_heads={n_kv_heads}"
            )
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.d_head = d_head
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.rotary_fraction = rotary_fraction
        self.qk_norm = qk_norm
        self.norm_eps = norm_eps
        self.bias = bias
        self.output_bias = output_bias
        self.causal = causal
        n_groups = n_heads // n_kv_heads
        self.heads = HeadGroups(
            d_model,
            n_groups,
            n_kv_heads,
            d_head,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rotary_fraction=rotary_fraction,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            bias=bias,
            output_bias=output_bias,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        selection: Selection = AllExperts(),
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> MixtureOutput:
        """Self-attention (see `Attention.forward`); there are no experts to select."""
        check_width(x, self.d_model)
        scope = attention_scope(x, mask, cache, causal=self.causal)
        keys, values = self.heads.keys_and_values(x, scope, cache, mask)
        return MixtureOutput(self.heads(x, scope, keys, values), None)

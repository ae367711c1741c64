"""The mixture of attention heads."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_dsmoe.attention.attention import Attention, attention_scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.attention.kv_cache import KVCache
from lightning_dsmoe.attention.rope_scaling import RopeScaling
from lightning_dsmoe.placement import Device, placement
from lightning_dsmoe.routing import (
    AllExperts,
    LinearRouter,
    MixtureOutput,
    RoutedLayer,
    Selection,
)
from lightning_dsmoe.routing.removed import select
from lightning_dsmoe.routing.router import RouterFactory
from lightning_dsmoe.routing.routing import GateScale, Kind, gate_factor


class MixtureOfAttentionHeads(RoutedLayer, Attention):
    """Mixture of attention heads: groups of query heads are experts over shared keys and values.

    y = c sum_i S_i(x) sum_j softmax(Q_ij K_j^T / sqrt(C)) V_j W_o,ij (arXiv 2404.05567, eqs. 7-8)

    Keys and values do not depend on routing, so a KV cache is as small as that of one expert.

    Args:
        d_model: width D of the tokens.
        n_experts: attention experts.
        n_heads: query heads of one expert, and KV heads of the layer.
        d_head: head width C.
        router: class of the router, called as `router(d_model, n_experts)`.
        gate_scale: "mean_one" takes c = n_experts, so that equal gates are plain grouped-query
            attention; "sum_to_one" takes c = 1, as in the paper.
        rope_theta: base of the rotary frequencies; None for no rotary positions.
        rope_scaling: changes those frequencies, as `Llama3RopeScaling` does; None for none.
        rotary_fraction: share of each head's channels that rotate, the first ones.
        qk_norm: whether queries and keys pass an RMSNorm over each head.
        norm_eps: epsilon of that norm; None for the smallest number of the type.
        bias: whether the projections have biases; the output's is ungated.
        output_bias: whether the projection of the output has one; None for as the others.
        causal: whether tokens attend to earlier ones alone, as in a decoder; false for encoders.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Raises:
        ValueError: if a size or an option is out of range.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe import MixtureOfAttentionHeads, TopK
        >>> attention = MixtureOfAttentionHeads(64, 4, 2, 16)  # 4 experts of 2 heads of width 16
        >>> output, routing = attention(torch.randn(2, 10, 64), TopK(2))
        >>> output.shape, routing.probs.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 4]))
    """

    kind: ClassVar[Kind] = "attention"

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        n_heads: int,
        d_head: int,
        *,
        router: RouterFactory = LinearRouter,
        gate_scale: GateScale = "mean_one",
        rope_theta: float | None = 10000.0,
        rope_scaling: RopeScaling | None = None,
        rotary_fraction: float = 1.0,
        qk_norm: bool = False,
        norm_eps: float | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        causal: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if qk_norm not in (False, True):
            raise ValueError(
                f"qk_norm of attention experts must be true or false, got {qk_norm!r:.200}: a norm "
                "over all heads would depend on experts that do not run; use GroupedQueryAttention"
            )
        self.d_model = d_model
        self.n_experts = n_experts
        self.n_heads = n_heads
        self.n_kv_heads = n_heads
        self.d_head = d_head
        self.gate_scale = gate_scale
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.rotary_fraction = rotary_fraction
        self.qk_norm = qk_norm
        self.norm_eps = norm_eps
        self.bias = bias
        self.output_bias = output_bias
        self.causal = causal
        self.gate_factor = gate_factor(gate_scale, n_experts)
        self.router = router(d_model, n_experts, **placement(device, dtype))
        self.heads = HeadGroups(
            d_model,
            n_experts,
            n_heads,
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
        """Self-attention with the experts that a selection chooses.

        Args:
            x: tokens `[B, T, D]`; with a cache, those that follow the tokens in it.
            selection: which experts run; by default all of them, as in training.
            mask: bool `[B, T]`, true for tokens and false for padding, on either side; None for no
                padding. Of PyTorch's, true for padding, `from_key_padding_mask` makes one.
            cache: keys and values of earlier tokens; the new ones are added to it.

        Returns:
            Tokens `[B, T, D]` and the routing of all experts.

        Raises:
            ValueError: if tokens, mask or cache do not match, the selection needs more experts, or
                there is a cache although `causal` is false.
            TypeError: if the selection is not one.
        """
        routing = self.router(x)
        gates, active = select(selection, routing, self.remaining)
        gates = self.gate_factor * gates
        scope = attention_scope(x, mask, cache, causal=self.causal)
        keys, values = self.heads.keys_and_values(x, scope, cache, mask)
        if isinstance(selection, AllExperts) or not self.heads.sparse_is_faster(x):
            y = self.heads(x, scope, keys, values, gates)
        else:
            y = self.heads.sparse_forward(x, scope, keys, values, gates, active)
        return MixtureOutput(y, routing)

    def parameters_by_expert(self) -> list[Tensor]:
        """Query and output weights of the experts, and their query biases."""
        each = [self.heads.w_q.weight, self.heads.w_o.weight, self.heads.b_q]
        return [tensor for tensor in each if tensor is not None]

    def extra_repr(self) -> str:
        """Options, for `print`."""
        return f"gate_scale={self.gate_scale!r}"

"""Groups of query heads over shared keys and values, each group under a gate.

Shapes: B sequences in a batch, T new positions, S positions so far, N = B T tokens, D width,
E groups of query heads, H heads of one group = KV heads, R = H C rows of one group, C head width,
G = H E heads and J = E R rows of all groups, M new tokens that use one group.
"""

import math
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.attention.attention import Scope
from lightning_dsmoe.attention.head_norm import HeadNorm
from lightning_dsmoe.attention.kv_cache import KVCache
from lightning_dsmoe.attention.rope_scaling import RopeScaling
from lightning_dsmoe.attention.rotary import rotary_of, rotate, rotation
from lightning_dsmoe.attention.sparse_attention import attend_of_tokens, attend_some
from lightning_dsmoe.placement import Device, Placement
from lightning_dsmoe.stacked import StackedWeight, dispatch, gated_projection, worth_sorting

QKNorm = bool | Literal["projection"]

_KERNELS_PER_GROUP = 30
"""About how many kernels one group starts in `sparse_forward`."""


class HeadGroups(nn.Module):
    """Grouped-query attention that multiplies the output of each group of query heads by its gate.

    y = sum_e g_e sum_j softmax(Q_ej K_j^T / sqrt(C)) V_j W_o,ej + b   (arXiv 2404.05567, eqs. 7-8)

    Keys and values never depend on the gates. The output bias is ungated.

    Args:
        d_model: width D of the tokens.
        n_groups: groups E of query heads.
        n_heads: heads H of one group, each with key and value heads of its own.
        d_head: head width C.
        rope_theta: base of the rotary frequencies; None for no rotary positions.
        rope_scaling: changes those frequencies; None for none.
        rotary_fraction: share of each head's channels that rotate, the first ones.
        qk_norm: whether queries and keys pass an RMSNorm over each head, or "projection" over all
            heads of all groups together, which then all have to run.
        norm_eps: epsilon of that norm; None for the smallest number of the type.
        bias: whether the projections have biases.
        output_bias: whether that of the output has one; None for as the others.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Raises:
        ValueError: if a size or an option is out of range, or an odd number of channels rotates.
    """

    def __init__(
        self,
        d_model: int,
        n_groups: int,
        n_heads: int,
        d_head: int,
        *,
        rope_theta: float | None = 10000.0,
        rope_scaling: RopeScaling | None = None,
        rotary_fraction: float = 1.0,
        qk_norm: QKNorm = False,
        norm_eps: float | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(d_model, n_groups, n_heads, d_head) < 1:
            raise ValueError(
                "attention needs a width, numbers of heads and a head width of at least 1, "
                f"got d_model={d_model}, {n_groups} groups of {n_heads} heads, d_head={d_head}"
            )
        if qk_norm not in (False, True, "projection"):
            raise ValueError(f"qk_norm must be true, false or 'projection', got {qk_norm!r:.200}")
        if norm_eps is not None and not 0 <= norm_eps < math.inf:
            raise ValueError(f"norm_eps must be 0 or more, got {norm_eps}")
        self.n_groups = n_groups
        self.n_heads = n_heads
        self.d_head = d_head
        self.rotary = rotary_of(d_head, rope_theta, rope_scaling, rotary_fraction)
        rows = n_heads * d_head
        placed: Placement = {"device": device, "dtype": dtype}
        self.w_q = StackedWeight(n_groups, rows, d_model, fan_in=d_model, **placed)
        self.w_o = StackedWeight(n_groups, rows, d_model, fan_in=n_groups * rows, **placed)
        self.kv = nn.Linear(d_model, 2 * rows, bias=bias, **placed)
        self.b_q = nn.Parameter(torch.empty(n_groups, rows, **placed)) if bias else None
        has_b_o = bias if output_bias is None else output_bias
        self.b_o = nn.Parameter(torch.empty(d_model, **placed)) if has_b_o else None
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if qk_norm:
            of_all = qk_norm == "projection"
            of_queries = (n_groups, n_heads, d_head) if of_all else (d_head,)
            of_keys = (n_heads, d_head) if of_all else (d_head,)
            self.q_norm = HeadNorm(of_queries, eps=norm_eps, **placed)
            self.k_norm = HeadNorm(of_keys, eps=norm_eps, **placed)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or pickle, also of version 0.1, which has `rope_theta`."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "rotary" not in state:
            self.rotary = rotary_of(self.d_head, state["rope_theta"])

    def reset_parameters(self) -> None:
        """Set the query and output biases to zero; the rest draws itself."""
        for bias in (self.b_q, self.b_o):
            if bias is not None:
                nn.init.zeros_(bias)

    def keys_and_values(
        self, x_BTD: Tensor, scope: Scope, cache: KVCache | None, mask_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, `[B, H, S, C]`; new ones go into the cache."""
        kv_BT2HC = rearrange(self.kv(x_BTD), "b t (two h c) -> b t two h c", two=2, h=self.n_heads)
        k_BTHC, v_BTHC = kv_BT2HC.unbind(2)
        k_BHTC = rearrange(self.k_norm(k_BTHC), "b t h c -> b h t c")
        v_BHTC = rearrange(v_BTHC, "b t h c -> b h t c")
        k_BHTC = self.place(k_BHTC, scope.positions_BT[:, None])
        if cache is None:
            return k_BHTC, v_BHTC
        valid_BT = x_BTD.new_ones(x_BTD.shape[:2]) if mask_BT is None else mask_BT
        cache.append(k_BHTC, v_BHTC, valid_BT.bool())
        return cache.keys[:, :, : cache.length], cache.values[:, :, : cache.length]

    def forward(
        self,
        x_BTD: Tensor,
        scope: Scope,
        keys_BHSC: Tensor,
        values_BHSC: Tensor,
        gates_BTE: Tensor | None = None,
    ) -> Tensor:
        """All groups for every token.

        Args:
            x_BTD: new tokens.
            scope: who attends to whom.
            keys_BHSC: keys of all tokens so far.
            values_BHSC: their values.
            gates_BTE: gate of each group; None for 1.
        """
        b_q = None if self.b_q is None else self.b_q.flatten()
        q_BTJ = F.linear(x_BTD, rearrange(self.w_q(), "e r d -> (e r) d"), b_q)
        q_BTEHC = rearrange(q_BTJ, "b t (e h c) -> b t e h c", e=self.n_groups, h=self.n_heads)
        q_BGTC = rearrange(self.q_norm(q_BTEHC), "b t e h c -> b (h e) t c")
        q_BGTC = self.place(q_BGTC, scope.positions_BT[:, None])
        heads_BGTC = F.scaled_dot_product_attention(
            q_BGTC,
            keys_BHSC,
            values_BHSC,
            attn_mask=None if scope.attend_BTS is None else scope.attend_BTS[:, None],
            is_causal=scope.causal and scope.attend_BTS is None,
            enable_gqa=self.n_groups > 1,
        )
        heads_NER = rearrange(heads_BGTC, "b (h e) t c -> (b t) e (h c)", h=self.n_heads)
        if gates_BTE is None:
            w_o = rearrange(self.w_o(), "e r d -> (e r) d")
            y_ND: Tensor = rearrange(heads_NER, "n e r -> n (e r)") @ w_o
        else:
            y_ND = gated_projection(heads_NER, rearrange(gates_BTE, "b t e -> (b t) e"), self.w_o())
        y_BTD = y_ND.view_as(x_BTD)
        return y_BTD if self.b_o is None else y_BTD + self.b_o

    def sparse_is_faster(self, x_BTD: Tensor) -> bool:
        """Whether `sparse_forward` is faster than running all groups, the others at a gate of 0."""
        n_weights = 2 * self.n_heads * self.d_head * x_BTD.shape[-1]
        n_tokens = x_BTD.shape[:2].numel()
        return worth_sorting(n_tokens, n_weights, x_BTD.device, n_kernels=_KERNELS_PER_GROUP)

    def sparse_forward(
        self,
        x_BTD: Tensor,
        scope: Scope,
        keys_BHSC: Tensor,
        values_BHSC: Tensor,
        gates_BTE: Tensor,
        active_BTE: Tensor,
    ) -> Tensor:
        """Only the active groups of each token: their queries, heads and outputs.

        Args:
            x_BTD: new tokens.
            scope: who attends to whom.
            keys_BHSC: keys of all tokens so far.
            values_BHSC: their values.
            gates_BTE: gate of each group.
            active_BTE: the groups that run, bool.
        """
        batch, length, _ = x_BTD.shape
        x_ND = rearrange(x_BTD, "b t d -> (b t) d")
        gates_NE, active_NE = (rearrange(g, "b t e -> (b t) e") for g in (gates_BTE, active_BTE))
        positions_N = scope.positions_BT.expand(batch, length).flatten()
        attend_NS = attend_of_tokens(scope, batch, length)
        y_ND = torch.zeros_like(x_ND)
        running, tokens = dispatch.tokens_of_each_expert(active_NE)
        for e, w_q, w_o, at_M in zip(
            running, self.w_q.of(running), self.w_o.of(running), tokens, strict=True
        ):
            q_MR = F.linear(x_ND[at_M], w_q, None if self.b_q is None else self.b_q[e])
            q_HMC = rearrange(q_MR, "m (h c) -> h m c", h=self.n_heads)
            q_HMC = self.place(self.q_norm(q_HMC), positions_N[at_M])
            heads_MR = attend_some(q_HMC, keys_BHSC, values_BHSC, at_M // length, attend_NS[at_M])
            gated_MR = heads_MR * gates_NE[at_M, e, None].to(heads_MR.dtype)
            y_ND = y_ND.index_add(0, at_M, (gated_MR @ w_o).to(y_ND.dtype))
        y_BTD = y_ND.view_as(x_BTD)
        return y_BTD if self.b_o is None else y_BTD + self.b_o

    def place(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries or keys by their positions."""
        return heads if self.rotary is None else rotate(heads, rotation(positions, *self.rotary))

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return (
            f"n_groups={self.n_groups}, n_heads={self.n_heads}, d_head={self.d_head}, "
            f"rotary={self.rotary}"
        )

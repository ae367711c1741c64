"""Expert networks: every expert under its gate, densely or only where it is active.

Shapes: N tokens, E experts, F hidden units of one expert, D width, R rows of all experts, M tokens
of one expert.
"""

from abc import ABC, abstractmethod
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.placement import Device
from lightning_dsmoe.stacked import StackedWeight, dispatch, gated_projection, worth_sorting

# fmt: off
ACTIVATIONS = (
    "celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "logsigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink",
    "softsign", "tanh", "tanhshrink",
    "gelu_tanh",
)
# fmt: on
"""Names of element-wise functions of `torch.nn.functional`, none of them random.

The last is its `gelu` with `approximate="tanh"`: gelu_new and gelu_pytorch_tanh of transformers.
"""

_KERNELS_PER_EXPERT = 10
"""About how many kernels one expert starts in `sparse_forward`."""


class Experts(nn.Module, ABC):
    """Two-layer networks of equal size whose outputs are summed under gates.

    y = sum_i g_i W_out,i a(W_in,i x + b_in,i) + b_out

    The output bias is shared and has no gate, so that dense and sparse computation agree. Subclass
    it and define `hidden`, the function a, for experts of your own.

    Args:
        d_model: width D of the tokens.
        n_experts: number of experts E.
        d_expert: hidden units F of one expert.
        activation: name of an element-wise function of PyTorch, such as gelu, silu or relu.
        bias: whether the projections have biases.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Raises:
        ValueError: if a size is below 1 or the activation is not one of `ACTIVATIONS`.

    Examples:
        >>> from lightning_dsmoe.experts import MLPExperts
        >>> class SquaredReLUExperts(MLPExperts):
        ...     def hidden(self, projected):
        ...         return projected.relu().square()
        >>> SquaredReLUExperts(8, 4, 16).extra_repr()
        "d_model=8, n_experts=4, d_expert=16, activation='gelu', bias=False"
    """

    projections_per_unit = 1

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        d_expert: int,
        *,
        activation: str = "gelu",
        bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(d_model, n_experts, d_expert) < 1:
            raise ValueError(
                "experts need d_model, n_experts and d_expert of at least 1, "
                f"got {d_model}, {n_experts} and {d_expert}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r:.200}"
            )
        self.d_model = d_model
        self.n_experts = n_experts
        self.d_expert = d_expert
        self.activation = activation
        self.bias = bias
        rows = self.projections_per_unit * d_expert
        stacked = partial(StackedWeight, n_experts, device=device, dtype=dtype)
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.w_in = stacked(rows, d_model, fan_in=d_model)
        self.w_out = stacked(d_expert, d_model, fan_in=n_experts * d_expert)
        self.b_in = nn.Parameter(empty(n_experts, rows)) if bias else None
        self.b_out = nn.Parameter(empty(d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the biases to zero; weights draw themselves."""
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                nn.init.zeros_(bias)

    @abstractmethod
    def hidden(self, projected: Tensor) -> Tensor:
        """Hidden units a `[..., F]` from their projections `[..., projections_per_unit * F]`."""

    def activate(self, x: Tensor) -> Tensor:
        """The activation function by its name."""
        if self.activation == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        activated: Tensor = getattr(F, self.activation)(x)
        return activated

    def forward(self, x_ND: Tensor, gates_NE: Tensor | None = None) -> Tensor:
        """Every expert on every token: two wide matrix products.

        Args:
            x_ND: tokens.
            gates_NE: gate of each expert; None for 1.

        Returns:
            Tokens `[N, D]`.
        """
        b_in = None if self.b_in is None else self.b_in.flatten()
        projected_NR = F.linear(x_ND, rearrange(self.w_in(), "e r d -> (e r) d"), b_in)
        hidden_NEF = self.hidden(rearrange(projected_NR, "n (e r) -> n e r", e=self.n_experts))
        if gates_NE is None:
            w_out = rearrange(self.w_out(), "e f d -> (e f) d")
            y_ND: Tensor = rearrange(hidden_NEF, "n e f -> n (e f)") @ w_out
        else:
            y_ND = gated_projection(hidden_NEF, gates_NE, self.w_out())
        return y_ND if self.b_out is None else y_ND + self.b_out

    def sparse_is_faster(self, x_ND: Tensor) -> bool:
        """Whether `sparse_forward` is faster than all experts, those not chosen at a gate of 0."""
        n_weights = (self.projections_per_unit + 1) * self.d_expert * self.d_model
        return worth_sorting(len(x_ND), n_weights, x_ND.device, n_kernels=_KERNELS_PER_EXPERT)

    def sparse_forward(self, x_ND: Tensor, gates_NE: Tensor, active_NE: Tensor) -> Tensor:
        """Only the active experts of each token: one small matrix product per expert and layer.

        Args:
            x_ND: tokens.
            gates_NE: gate of each expert.
            active_NE: the experts that run, bool.

        Returns:
            Tokens `[N, D]`.
        """
        y_ND = torch.zeros_like(x_ND)
        running, tokens = dispatch.tokens_of_each_expert(active_NE)
        for e, w_in, w_out, at_M in zip(
            running, self.w_in.of(running), self.w_out.of(running), tokens, strict=True
        ):
            b_in = None if self.b_in is None else self.b_in[e]
            hidden_MF = self.hidden(F.linear(x_ND[at_M], w_in, b_in))
            gated_MF = hidden_MF * gates_NE[at_M, e, None].to(hidden_MF.dtype)
            y_ND = y_ND.index_add(0, at_M, (gated_MF @ w_out).to(y_ND.dtype))
        return y_ND if self.b_out is None else y_ND + self.b_out

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return (
            f"d_model={self.d_model}, n_experts={self.n_experts}, d_expert={self.d_expert}, "
            f"activation={self.activation!r}, bias={self.bias}"
        )


class MLPExperts(Experts):
    """Plain two-layer experts: a(z) = act(z), as in arXiv 2404.05567.

    Args:
        d_model: width D of the tokens.
        n_experts: number of experts E.
        d_expert: hidden units F of one expert.
        activation: name of an element-wise function of PyTorch, such as gelu, silu or relu.
        bias: whether the projections have biases.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Examples:
        >>> import torch
        >>> experts = MLPExperts(8, 4, 16)  # 4 experts of 16 hidden units for tokens of width 8
        >>> experts(torch.randn(5, 8), torch.rand(5, 4)).shape
        torch.Size([5, 8])
    """

    def hidden(self, projected: Tensor) -> Tensor:
        """act(z)."""
        return self.activate(projected)


class GLUExperts(Experts):
    """Gated linear units: a(z_gate, z_up) = act(z_gate) z_up; SwiGLU, GEGLU (arXiv 2002.05202).

    The rows of each expert hold its gate projection first, then its up projection.

    Args:
        d_model: width D of the tokens.
        n_experts: number of experts E.
        d_expert: hidden units F of one expert.
        activation: silu gives SwiGLU, gelu GEGLU.
        bias: whether the projections have biases.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Examples:
        >>> import torch
        >>> swiglu = GLUExperts(8, 4, 16, activation="silu")
        >>> swiglu(torch.randn(5, 8), torch.rand(5, 4)).shape
        torch.Size([5, 8])
    """

    projections_per_unit = 2

    def hidden(self, projected: Tensor) -> Tensor:
        """act(z_gate) z_up."""
        gate, up = projected.chunk(2, dim=-1)
        return self.activate(gate) * up

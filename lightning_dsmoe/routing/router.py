"""Routers score experts: S = softmax(h(x)).

Shapes: D width, E experts, R hidden width of a router; leading dimensions are free.
"""

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.placement import Device
from lightning_dsmoe.precision import at_least_float32, without_autocast
from lightning_dsmoe.routing.routing import Routing
from lightning_dsmoe.token_shapes import check_width


class Router(nn.Module, ABC):
    """Scores every expert for every token, S = softmax(h(x)), in float32 under any autocast.

    Subclass it and define `score`, the function h, for a router of your own.

    Args:
        d_model: width D of the tokens.
        n_experts: number of experts E.

    Raises:
        ValueError: if a size is below 1.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> class NormRouter(Router):
        ...     def __init__(self, d_model: int, n_experts: int) -> None:
        ...         super().__init__(d_model, n_experts)
        ...         self.weight = nn.Parameter(torch.randn(n_experts, d_model))
        ...
        ...     def score(self, x):
        ...         return nn.functional.normalize(x, dim=-1) @ self.weight.mT
        >>> logits, probs = NormRouter(8, 4)(torch.randn(2, 3, 8))
        >>> probs.shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        if d_model < 1 or n_experts < 1:
            raise ValueError(
                f"a router needs d_model >= 1 and n_experts >= 1, got {d_model} and {n_experts}"
            )
        self.d_model = d_model
        self.n_experts = n_experts

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        """Logits h(x): `[..., D]` to `[..., E]`, both of the same type, at least float32."""

    def forward(self, x: Tensor) -> Routing:
        """Score tokens in float32, or in float64 if that is their type.

        Args:
            x: tokens `[..., D]`.

        Returns:
            Logits and probabilities `[..., E]`.

        Raises:
            ValueError: if the tokens have another width.
        """
        check_width(x, self.d_model)
        with without_autocast(x.device.type):
            logits = self.score(at_least_float32(x))
            return Routing(logits, logits.softmax(-1))

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"d_model={self.d_model}, n_experts={self.n_experts}"


class RouterFactory(Protocol):
    """Makes the router of one layer."""

    def __call__(self, d_model: int, n_experts: int) -> Router:
        """Make a router that scores `n_experts` experts."""


class LinearRouter(Router):
    """One linear layer without bias: h(x) = W x.

    Args:
        d_model: width D of the tokens.
        n_experts: number of experts E.
        init_std: standard deviation of the initial weights; 0 starts with equal gates.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Examples:
        >>> import torch
        >>> router = LinearRouter(8, 4, init_std=0.0)  # equal gates before training
        >>> router(torch.randn(8)).probs.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        init_std: float = 0.02,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, n_experts)
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(n_experts, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight, std=self.init_std)

    def score(self, x: Tensor) -> Tensor:
        """h(x) = W x."""
        return F.linear(x, self.weight.to(x.dtype))


class MLPRouter(Router):
    """Two linear layers with a GELU between them: h(x) = W2 gelu(W1 x + b).

    Args:
        d_model: width D of the tokens.
        n_experts: number of experts E.
        d_hidden: hidden width R; 512 reproduces the parameter counts of arXiv 2404.05567, Table 1.
        init_std: standard deviation of the last layer's initial weights; 0 starts with equal gates.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Examples:
        >>> import torch
        >>> router = MLPRouter(8, 4, d_hidden=16)
        >>> router(torch.randn(2, 3, 8)).logits.shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        d_hidden: int = 512,
        init_std: float = 0.02,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, n_experts)
        if d_hidden < 1:
            raise ValueError(f"d_hidden must be at least 1, got {d_hidden}")
        self.d_hidden = d_hidden
        self.init_std = init_std
        self.hidden = nn.Linear(d_model, d_hidden, device=device, dtype=dtype)
        self.out = nn.Parameter(torch.empty(n_experts, d_hidden, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.hidden.reset_parameters()
        nn.init.normal_(self.out, std=self.init_std)

    def score(self, x: Tensor) -> Tensor:
        """h(x) = W2 gelu(W1 x + b)."""
        hidden = F.gelu(F.linear(x, self.hidden.weight.to(x.dtype), self.hidden.bias.to(x.dtype)))
        return F.linear(hidden, self.out.to(x.dtype))


class CosineRouter(Router):
    """Cosine similarity of a projected token to one centroid per expert, times a learned scale.

    h(x)_i = exp(s) cos(P x, c_i), with a learned log-scale s, kept below ln 100.

    Args:
        d_model: width D of the tokens.
        n_experts: number of experts E.
        d_hidden: width R of the projection.
        init_scale: initial exp(s).
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Examples:
        >>> import torch
        >>> router = CosineRouter(8, 4, d_hidden=16, init_scale=10.0)
        >>> bool(router(torch.randn(2, 3, 8)).logits.abs().max() <= 10)
        True
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        d_hidden: int = 512,
        init_scale: float = 1.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, n_experts)
        if d_hidden < 1 or init_scale <= 0:
            raise ValueError(
                f"d_hidden must be at least 1 and init_scale positive, got {d_hidden}, {init_scale}"
            )
        self.d_hidden = d_hidden
        self.init_scale = init_scale
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.projection = nn.Parameter(empty(d_hidden, d_model))
        self.centroids = nn.Parameter(empty(n_experts, d_hidden))
        self.log_scale = nn.Parameter(empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.projection, std=1 / math.sqrt(self.d_model))
        nn.init.normal_(self.centroids)
        nn.init.constant_(self.log_scale, math.log(self.init_scale))

    def score(self, x: Tensor) -> Tensor:
        """h(x)_i = exp(s) cos(P x, c_i)."""
        directions = F.normalize(F.linear(x, self.projection.to(x.dtype)), dim=-1)
        centroids = F.normalize(self.centroids.to(x.dtype), dim=-1)
        scale = self.log_scale.to(x.dtype).clamp(max=math.log(100)).exp()
        return scale * F.linear(directions, centroids)

"""Optimizers.

Shapes: R rows of a weight, D its columns.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from lightning_dsmoe.training.optimization import is_hidden_matrix

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients with the steepest slope at 0 (https://kellerjordan.github.io/posts/muon/)."""


class MuonWithAdamW(AdamW):
    """Muon for the weight matrices of hidden layers, expert by expert, and AdamW for all others.

    W <- (1 - lr decay) W - 0.2 lr sqrt(max(R, D)) NS(g + momentum m), m <- momentum m + g

    NS makes all singular values of a matrix [R, D] about 1, by five Newton-Schulz iterations
    (https://kellerjordan.github.io/posts/muon/). The factor gives updates the size of AdamW's, so
    that both parts share a learning rate and weight decay, which may be those found for AdamW
    (arXiv 2502.16982, eq. 4). Embeddings, the head, routers, norms and biases are AdamW's.

    Args:
        params: groups of named parameters, as `parameter_groups` returns them.
        lr: learning rate of both parts.
        betas: decay rates of AdamW's two moments.
        eps: added to AdamW's denominator.
        weight_decay: of both parts, where a group does not have its own.
        momentum: decay rate of Muon's momentum.

    Raises:
        ValueError: if parameters have no names, are sharded, or a number is out of range.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe.optimizers import MuonWithAdamW
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> optimizer = MuonWithAdamW(model.named_parameters(), lr=1e-3)
        >>> [(group["muon"], len(group["params"])) for group in optimizer.param_groups]
        [(True, 1), (False, 3)]
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        groups, self.param_groups = self.param_groups, []
        for group in groups:
            if "param_names" not in group:
                raise ValueError(
                    "MuonWithAdamW finds matrices of hidden layers by their names; give it "
                    "parameter_groups(model) or model.named_parameters()"
                )
            named = list(zip(group.pop("param_names"), group.pop("params"), strict=True))
            if any(isinstance(parameter, DTensor) for _, parameter in named):
                raise ValueError("MuonWithAdamW needs whole matrices, but the strategy shards them")
            for muon, options in ((True, {"momentum": momentum}), (False, {})):
                part = [pair for pair in named if is_hidden_matrix(*pair) == muon]
                if part:
                    self.add_param_group({**group, "params": part, "muon": muon, **options})

    def _init_group(self, group: dict[str, Any], *args: Any) -> bool:
        # AdamW collects here what it updates: none of Muon's groups.
        return False if group["muon"] else super()._init_group(group, *args)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradients at hand, or with those that `closure` makes."""
        loss = super().step(closure)
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._muon(parameter, parameter.grad, group)
        return loss

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            # AdamW expects a step in every state that it loads.
            state["step"] = torch.zeros(())
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        mean = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        update = orthogonalize(gradient.add(mean, alpha=group["momentum"]))
        size = 0.2 * math.sqrt(max(parameter.shape[-2:]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * size)


def orthogonalize(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """Matrices with the singular vectors of those given, and singular values from 0.7 to 1.2.

    Source: https://kellerjordan.github.io/posts/muon/.

    Args:
        matrices: `[..., R, D]`.
        steps: Newton-Schulz iterations.

    Returns:
        `[..., R, D]`, in bfloat16 on a GPU, where it suffices and is fast, else in float32.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.optimizers import orthogonalize
        >>> values = torch.linalg.svdvals(orthogonalize(torch.tensor([[3.0, 0.0], [0.0, 1.0]])))
        >>> bool((values > 0.6).all() and (values < 1.3).all())
        True
    """
    a, b, c = _QUINTIC
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = x.mT if tall else x
    return orthogonal

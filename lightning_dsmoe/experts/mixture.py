"""The mixture of feed-forward experts.

Shapes: B sequences in a batch, T positions, N = B T tokens, D width, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_dsmoe.experts.experts import MLPExperts
from lightning_dsmoe.experts.feed_forward import ExpertsFactory, FeedForward, FeedForwardLayer
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
from lightning_dsmoe.routing.routing import GateScale, gate_factor


class MixtureOfExperts(RoutedLayer, FeedForwardLayer):
    """Mixture of experts that trains all of them on every token and runs as few as wanted later.

    y = c sum_i S_i(x) e_i(x), with S the router's probabilities (arXiv 2404.05567, eq. 3)

    Args:
        d_model: width D of the tokens.
        n_experts: number of experts E.
        d_expert: hidden units of one expert.
        router: class of the router, called as `router(d_model, n_experts)`.
        experts: class of the experts, called as `experts(d_model, n_experts, d_expert)`.
        d_shared: hidden units of one more expert that always runs, at gate 1; 0 for none.
        shared_gate: whether that expert has a gate of its own, sigmoid(w x), as in Qwen2-MoE; its
            output bias, like that of the others, has none.
        gate_scale: "mean_one" takes c = E, so that equal gates are the dense layer of the same
            width; "sum_to_one" takes c = 1, as in the paper.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Raises:
        ValueError: if a size or `gate_scale` is out of range, or a shared gate has no expert.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe import MixtureOfExperts, TopK, mutual_information_loss
        >>> moe = MixtureOfExperts(64, 8, 32)  # width 64, 8 experts of 32 hidden units
        >>> x = torch.randn(2, 10, 64)
        >>> y, routing = moe(x)  # training: every expert, two matrix products
        >>> loss = y.square().mean() + 0.02 * mutual_information_loss(routing.probs)
        >>> y, routing = moe(x, TopK(2))  # inference: the two most probable experts of each token
        >>> y.shape, routing.probs.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 8]))
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        d_expert: int,
        *,
        router: RouterFactory = LinearRouter,
        experts: ExpertsFactory = MLPExperts,
        d_shared: int = 0,
        shared_gate: bool = False,
        gate_scale: GateScale = "mean_one",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_shared < 0:
            raise ValueError(f"d_shared must be 0 or more, got {d_shared}")
        if shared_gate and not d_shared:
            raise ValueError("shared_gate needs a shared expert, got d_shared=0")
        self.d_model = d_model
        self.n_experts = n_experts
        self.d_expert = d_expert
        self.d_shared = d_shared
        self.gate_scale = gate_scale
        self.gate_factor = gate_factor(gate_scale, n_experts)
        placed = placement(device, dtype)
        self.router = router(d_model, n_experts, **placed)
        self.experts = experts(d_model, n_experts, d_expert, **placed)
        self.shared = None
        if d_shared:
            self.shared = FeedForward(d_model, d_shared, experts=experts, **placed)
        self.shared_gate = None
        if shared_gate:
            self.shared_gate = nn.Linear(d_model, 1, bias=False, device=device, dtype=dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or pickle, also of version 0.1, which has no `shared_gate`."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "shared_gate" not in {*state, *state["_modules"]}:
            self.shared_gate = None

    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        """Transform tokens with the experts that a selection chooses.

        Args:
            x: tokens `[..., D]`.
            selection: which experts run; by default all of them, as in training.

        Returns:
            Tokens `[..., D]` and the routing of all experts.

        Raises:
            ValueError: if the tokens have another width, or the selection needs more experts.
            TypeError: if the selection is not one.
        """
        routing = self.router(x)
        gates, active = select(selection, routing, self.remaining)
        x_ND = x.reshape(-1, self.d_model)
        gates_NE = (self.gate_factor * gates).reshape(-1, gates.shape[-1])
        if isinstance(selection, AllExperts) or not self.experts.sparse_is_faster(x_ND):
            y_ND = self.experts(x_ND, gates_NE)
        else:
            y_ND = self.experts.sparse_forward(x_ND, gates_NE, active.reshape(gates_NE.shape))
        if self.shared is not None and self.shared_gate is not None:
            gates_N1 = self.shared_gate(x_ND).sigmoid()
            y_ND = y_ND + self.shared.experts(x_ND, gates_N1)
        y = y_ND.view_as(x)
        if self.shared is not None and self.shared_gate is None:
            y = y + self.shared(x).output
        return MixtureOutput(y, routing)

    def parameters_by_expert(self) -> list[Tensor]:
        """Weights of the experts, and their input biases."""
        each = [self.experts.w_in.weight, self.experts.w_out.weight, self.experts.b_in]
        return [tensor for tensor in each if tensor is not None]

    def extra_repr(self) -> str:
        """Options, for `print`."""
        return f"gate_scale={self.gate_scale!r}"

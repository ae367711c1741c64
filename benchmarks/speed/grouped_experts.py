"""A sparsely trained mixture by grouped matrix products, as MegaBlocks and its like train one.

Shapes: B sequences, T positions, N = B T tokens, D width, F width of an expert, E experts,
K active experts, P = N K pairs of a token and an expert.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe import MixtureOfExperts
from lightning_dsmoe.experts import FeedForwardLayer
from lightning_dsmoe.routing import AllExperts, MixtureOutput, Selection


class GroupedExperts(FeedForwardLayer):
    """Mixture whose tokens are sorted by expert, without dropping any or waiting for the host.

    Args:
        mixture: has the router and the experts, without biases.
        k: experts K that run for a token.
    """

    def __init__(self, mixture: MixtureOfExperts, k: int) -> None:
        super().__init__()
        self.mixture = mixture
        self.k = k

    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        """Transform tokens with the K most probable experts, whatever the selection."""
        experts = self.mixture.experts
        routing = self.mixture.router(x)
        gates_NK, chosen_NK = routing.probs.flatten(0, -2).topk(self.k)
        chosen_P = chosen_NK.flatten()
        order_P = chosen_P.argsort()
        token_P = order_P // self.k
        is_chosen_PE = chosen_P[:, None] == torch.arange(experts.n_experts, device=x.device)
        ends_E = is_chosen_PE.sum(0).cumsum(0).to(torch.int32)
        x_ND = x.flatten(0, -2)
        x_PD = x_ND.index_select(0, token_P)
        hidden_PF = experts.hidden(_grouped(x_PD, experts.w_in().mT, ends_E))
        y_PD = _grouped(hidden_PF, experts.w_out(), ends_E)
        gates_P = self.mixture.gate_factor * gates_NK.flatten()[order_P].to(y_PD.dtype)
        y_ND = torch.zeros_like(x_ND, dtype=y_PD.dtype)
        y_ND = y_ND.index_add(0, token_P, y_PD * gates_P[:, None])
        return MixtureOutput(y_ND.view_as(x), routing)


def _grouped(x_PD: Tensor, weights_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """x W of each expert; autocast knows nothing of grouped products."""
    device = x_PD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_PD, weights_EDF = x_PD.to(dtype), weights_EDF.to(dtype)
    return F.grouped_mm(x_PD, weights_EDF, offs=ends_E)

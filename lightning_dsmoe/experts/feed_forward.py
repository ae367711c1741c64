"""What follows attention in a decoder block: its base, and the plain feed-forward layer."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_dsmoe.experts.experts import Experts, MLPExperts
from lightning_dsmoe.placement import Device, placement
from lightning_dsmoe.routing import AllExperts, MixtureOutput, Selection
from lightning_dsmoe.token_shapes import check_width


class FeedForwardLayer(nn.Module, ABC):
    """Base of the feed-forward layers of a block, which transform each token by itself."""

    @abstractmethod
    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        """Transform tokens.

        Args:
            x: tokens `[B, T, D]`.
            selection: the experts that run; a layer without a router ignores it.

        Returns:
            Tokens `[B, T, D]` and the routing, None without a router.
        """


class ExpertsFactory(Protocol):
    """Makes the experts of one layer."""

    def __call__(self, d_model: int, n_experts: int, d_expert: int) -> Experts:
        """Make `n_experts` experts of `d_expert` hidden units."""


class FeedForward(FeedForwardLayer):
    """Feed-forward layer of a dense transformer: one expert that always runs, at gate 1.

    Args:
        d_model: width D of the tokens.
        d_hidden: hidden units.
        experts: class of the network, called as `experts(d_model, 1, d_hidden)`.
        device: where the weights are made; None for PyTorch's default.
        dtype: type of the weights; None for PyTorch's default.

    Examples:
        >>> import torch
        >>> layer = FeedForward(8, 32)
        >>> layer(torch.randn(2, 3, 8)).output.shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        experts: ExpertsFactory = MLPExperts,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.experts = experts(d_model, 1, d_hidden, **placement(device, dtype))

    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        """Transform tokens `[..., D]`; there are no experts to select."""
        check_width(x, self.d_model)
        return MixtureOutput(self.experts(x.reshape(-1, self.d_model)).view_as(x), None)

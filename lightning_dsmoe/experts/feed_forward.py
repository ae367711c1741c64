"""What follows attention in a decoder block: its base, and the plain feed-forward layer."""

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from lightning_dsmoe.experts.experts import Experts, MLPExperts
from lightning_dsmoe.routing import AllExperts, MixtureOutput, Selection
from lightning_dsmoe.token_shapes import check_width


class FeedForwardLayer(nn.Module, ABC):
    """Base of the layers that treat each token by itself, with or without routing."""

    @abstractmethod
    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        """Transform tokens `[B, T, D]`; a layer without a router ignores `selection`."""


class ExpertsFactory(Protocol):
    """Makes the experts of one layer."""

    def __call__(self, d_model: int, n_experts: int, d_expert: int) -> Experts:
        """Make `n_experts` experts of `d_expert` hidden units."""
        ...


class FeedForward(FeedForwardLayer):
    """Feed-forward layer of a dense transformer: one expert that always runs, at gate 1.

    Args:
        d_model: width D of the tokens.
        d_hidden: hidden units.
        experts: class of the network, called as `experts(d_model, 1, d_hidden)`.
    """

    def __init__(
        self, d_model: int, d_hidden: int, *, experts: ExpertsFactory = MLPExperts
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.experts = experts(d_model, 1, d_hidden)

    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        """Transform tokens `[..., D]`; there is nothing to select."""
        check_width(x, self.d_model)
        return MixtureOutput(self.experts(x.reshape(-1, self.d_model)).view_as(x), None)

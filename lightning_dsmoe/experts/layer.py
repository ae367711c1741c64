"""What follows attention in a decoder block."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_dsmoe.routing import AllExperts, MixtureOutput, Selection


class FeedForwardLayer(nn.Module, ABC):
    """Base of the layers that treat each token by itself, with or without routing."""

    @abstractmethod
    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        """Transform tokens `[B, T, D]`; a layer without a router ignores `selection`."""

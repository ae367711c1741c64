"""The normalisation of queries and keys."""

from torch import Tensor, nn


class HeadNorm(nn.RMSNorm):
    """An RMSNorm over each head or over all heads, in the type of its weights and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)

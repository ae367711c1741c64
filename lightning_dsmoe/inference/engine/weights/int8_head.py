"""The last projection in 8 bits.

Shapes: D width, V vocabulary; leading dimensions are free.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.inference.engine.weights.row_major import Int8RowMajorWeights


class Int8Head(nn.Module):
    """A projection to the vocabulary whose rows are int8 codes with one scale each.

    Args:
        rows: the rows, as those of a single expert: `[1, V, D]`.
    """

    def __init__(self, rows: Int8RowMajorWeights) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[..., V]` of tokens `[..., D]`."""
        return F.linear(x, self.rows.rows(0))

    def matvec(self, x_TD: Tensor) -> Tensor:
        """Logits `[T, V]` of few tokens, reading the codes once."""
        return self.rows.project(x_TD, None)[0].to(x_TD.dtype)

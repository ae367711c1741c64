"""The projection to the vocabulary in 8 bits.

Shapes: N tokens, D model width, V vocabulary; leading dimensions are free.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.inference.engine.weights.row_major import Int8RowMajorWeights


class Int8Head(nn.Module):
    """A projection to the vocabulary whose rows are int8 codes with one scale each.

    An option beside 8-bit experts: at best 3.59 ms a token rather than 3.90 with 100 M parameters
    (docs/lab_notes/int8.md).

    Args:
        rows: the weight, as that of a single expert: `[1, V, D]`.
    """

    def __init__(self, rows: Int8RowMajorWeights) -> None:
        super().__init__()
        self.rows = rows  # the name is in the weight files of artifacts

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[..., V]` of tokens `[..., D]`."""
        return F.linear(x, self.rows.rows(0))

    def matvec(self, x_ND: Tensor) -> Tensor:
        """Logits `[N, V]` of a few tokens, reading codes without a float copy of the weight."""
        return self.rows.project(x_ND, None)[0].to(x_ND.dtype)

"""The loss of a language model, and the label that does not count.

Shapes: B sequences in a batch, T positions, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Label of a position without a target, which losses and metrics leave out; PyTorch's default."""


def window_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of -ln p(label) over the tokens of each sequence that count, in nats and in float32.

    Args:
        logits_BTV: logits of the next tokens, `[B, T, V]`.
        labels_BT: the next tokens, `[B, T]`; -100 does not count.

    Returns:
        One sum for each sequence, `[B]`.
    """
    loss_N = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(),
        labels_BT.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return loss_N.view_as(labels_BT).sum(-1)


def summed_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of -ln p(label) over the tokens that count, in nats and in float32.

    Args:
        logits_BTV: logits of the next tokens, `[B, T, V]`.
        labels_BT: the next tokens, `[B, T]`; -100 does not count.

    Returns:
        A scalar, 0 if no token counts.
    """
    return F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )

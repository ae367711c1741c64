"""The loss that keeps two predictions of the same tokens alike.

Shapes: V vocabulary; leading dimensions (tokens) are free; X tokens in one dimension.
"""

from torch import Tensor

from lightning_dsmoe.losses.masking import flatten_tokens
from lightning_dsmoe.precision import without_autocast


def consistency_loss(logits: Tensor, others: Tensor, mask: Tensor | None = None) -> Tensor:
    """Symmetric divergence: mean over tokens of (KL(p || q) + KL(q || p)) / 2, p and q predictions.

    Source: R-Drop, arXiv 2106.14448, eq. 2; gradients go into both predictions.

    Args:
        logits: logits of the one, `[..., V]`.
        others: logits of the other, `[..., V]`.
        mask: tokens that count, `[...]`; None counts all. No token counting gives 0.

    Returns:
        A scalar of at least float32, in nats.

    Raises:
        ValueError: if the shapes differ or the mask does not cover the tokens.
    """
    if logits.shape != others.shape:
        raise ValueError(f"logits of shapes {tuple(logits.shape)} and {tuple(others.shape)}")
    logits_XV, weight_X = flatten_tokens(logits, mask)
    others_XV, _ = flatten_tokens(others, mask)
    with without_autocast(logits.device.type):
        log_p_XV, log_q_XV = logits_XV.log_softmax(-1), others_XV.log_softmax(-1)
        both_X = ((log_p_XV.exp() - log_q_XV.exp()) * (log_p_XV - log_q_XV)).sum(-1)
        return 0.5 * (weight_X @ both_X) / weight_X.sum().clamp_min(1)

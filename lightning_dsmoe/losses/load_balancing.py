"""The balance loss of sparsely trained mixtures.

Shapes: N experts; leading dimensions (tokens) are free.
"""

from torch import Tensor

from lightning_dsmoe.losses.masking import flatten_tokens
from lightning_dsmoe.precision import without_autocast


def load_balancing_loss(probs: Tensor, active: Tensor, mask: Tensor | None = None) -> Tensor:
    """Loss of the Switch Transformer: N sum_i f_i P_i, which is 1 when balanced, for any k.

    f_i is expert i's share of all the assignments, P_i its mean probability (arXiv 2101.03961,
    eqs. 4 to 6; f_i is divided by k so that the value does not depend on it).

    Args:
        probs: router probabilities, `[..., N]`.
        active: the experts that ran, bool `[..., N]`, as `TopK(k).mask(probs)` gives.
        mask: tokens that count, `[...]`; None counts all. No token counting gives 0.

    Returns:
        A scalar of at least float32.

    Raises:
        ValueError: if the shapes differ or the mask does not cover the tokens.
    """
    if active.shape != probs.shape:
        raise ValueError(f"active of {tuple(active.shape)} for probs of {tuple(probs.shape)}")
    probs, weight = flatten_tokens(probs, mask)
    with without_autocast(probs.device.type):
        assignments = weight @ active.reshape(probs.shape).to(probs)
        share = assignments / assignments.sum().clamp_min(1)
        return probs.shape[-1] * share @ (weight @ probs) / weight.sum().clamp_min(1)

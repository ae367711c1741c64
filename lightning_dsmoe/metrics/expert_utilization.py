"""How a router uses its experts.

Shapes: N tokens, E experts; leading dimensions (tokens) are free.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.imports import imported_on_use
from lightning_dsmoe.losses import entropy
from lightning_dsmoe.losses.token_sums import flatten_tokens
from lightning_dsmoe.precision import without_autocast

__getattr__ = imported_on_use(__name__, ExpertUtilization="metrics.expert_utilization_metric")

DEAD_SHARE = 0.01
"""An expert is dead if its gate share is at most this fraction of an even share, 1/E."""


class Utilization(NamedTuple):
    """How a router uses its experts, over some tokens.

    Without tokens, or with all gates zero, everything is 0 and all experts are dead.

    Args:
        share: `[E]`, gate share p(e) of each expert: its mean gate over the tokens.
        effective: scalar, effective experts exp H(e), from 1 to E: the number of equally used
            experts with the same entropy.
        entropy: scalar, H(e) in nats, the entropy of the gate shares; ln E if the load is balanced.
        conditional_entropy: scalar, H(e|x) in nats, the mean entropy of one token's gates; 0 if
            routing is confident, ln E if it is uncertain. H(e) - H(e|x) is the mutual information
            (MI) of tokens and experts.
        dead: bool `[E]`, the dead experts, whose gate share is at most a small fraction of 1/E.
    """

    share: Tensor
    effective: Tensor
    entropy: Tensor
    conditional_entropy: Tensor
    dead: Tensor

    @property
    def dead_experts(self) -> list[int]:
        """Numbers of the dead experts, in ascending order."""
        numbers: list[int] = self.dead.reshape(-1).nonzero().flatten().tolist()
        return numbers


def expert_utilization(
    probs: Tensor, mask: Tensor | None = None, *, dead_share: float = DEAD_SHARE
) -> Utilization:
    """Gate shares, entropies and dead experts of a router, over the tokens of a batch.

    p(e) = mean_x S(x), effective = exp H(e)   (S: gates, arXiv 2404.05567, eqs. 4 and 5)

    Args:
        probs: router probabilities S, `[..., E]`, float.
        mask: tokens that count, `[...]`, bool or 0/1; None counts all.
        dead_share: an expert is dead if its gate share is at most this fraction of 1/E.

    Returns:
        The utilization, at least in float32; entropies in nats.

    Raises:
        ValueError: if the shape of the mask is not that of the tokens.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.metrics import expert_utilization
        >>> used = expert_utilization(torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]))
        >>> used.share
        tensor([0.5000, 0.5000, 0.0000])
        >>> used.effective, used.dead_experts
        (tensor(2.), [2])
    """
    return utilization_of_sums(*utilization_sums(probs, mask), dead_share)


def utilization_sums(probs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the gates `[E]`, sum of the tokens' entropies, number of tokens."""
    probs_NE, weight_N = flatten_tokens(probs.detach(), mask)
    with without_autocast(probs.device.type):
        return weight_N @ probs_NE, weight_N @ entropy(probs_NE), weight_N.sum().long()


def utilization_of_sums(
    gates: Tensor, conditional_entropies: Tensor, tokens: Tensor, dead_share: float
) -> Utilization:
    """The utilization from sums of what `utilization_sums` gives."""
    count = tokens.clamp_min(1)
    share = gates / count
    marginal = entropy(share)
    return Utilization(
        share=share,
        effective=torch.where(share.sum() > 0, marginal.exp(), 0.0),
        entropy=marginal,
        conditional_entropy=conditional_entropies / count,
        dead=share * len(share) <= dead_share,
    )

"""What all losses of routers are made of: sums over the tokens that count.

Apart from the losses, so that the sums of all routers of a model can go over ranks in one
communication, whatever shapes their tokens have there.

Shapes: R routers, N tokens, E experts, J = R E; leading dimensions (tokens) are free.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from lightning_dsmoe.losses.token_sums import flatten_tokens, sum_over_ranks
from lightning_dsmoe.precision import without_autocast


def entropy(probs: Tensor) -> Tensor:
    """Entropy over the last dimension, H(p) = -sum_i p_i ln p_i, in nats.

    Values and gradients stay finite where a probability is zero.

    Args:
        probs: probabilities `[..., E]`.

    Returns:
        Entropies `[...]`.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.losses import entropy
        >>> round(entropy(torch.tensor([0.5, 0.5, 0.0])).item(), 3)  # ln 2
        0.693
    """
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)


class RouterSums(NamedTuple):
    """Sums over the tokens of some routers that count, with as many experts each.

    Shape:
        tokens: `[R, 1]`, their number.
        probs: `[R, E]`.
        entropies: `[R]`, of a token's probabilities, in nats.
        active: `[R, E]`, tokens that ran an expert; None if no loss needs it.
        squared_z: `[R]`, (ln sum_i exp h_i)^2 of the logits h; None if no loss needs it.
    """

    tokens: Tensor
    probs: Tensor
    entropies: Tensor
    active: Tensor | None = None
    squared_z: Tensor | None = None

    def map(self, make: Callable[[Tensor], Tensor]) -> "RouterSums":
        """Each of the sums made into another; those that no loss needs stay None."""
        return RouterSums(*(None if part is None else make(part) for part in self))  # type: ignore[arg-type]


def router_sums(
    probs: Tensor,
    mask: Tensor | None = None,
    *,
    active: Tensor | None = None,
    logits: Tensor | None = None,
) -> RouterSums:
    """Sum over the tokens of routers that see the same tokens, on this process.

    Args:
        probs: probabilities of R routers, `[R, ..., E]`.
        mask: tokens that count, `[...]`; None counts all.
        active: the experts that ran, bool `[R, ..., E]`, if their sum is needed.
        logits: of which `probs` is the softmax, if the sum of z is needed.

    Raises:
        ValueError: if the mask does not cover the tokens.
    """
    n_routers = len(probs)

    def by_router(values_NJ: Tensor) -> Tensor:
        return rearrange(weight_N @ values_NJ, "(r e) -> r e", r=n_routers)

    probs_NJ, weight_N = flatten_tokens(rearrange(probs, "r ... e -> ... (r e)"), mask)
    entropy_NR = entropy(rearrange(probs_NJ, "n (r e) -> n r e", r=n_routers))
    with without_autocast(probs.device.type):
        active_RE = squared_z_R = None
        if active is not None:
            active_RE = by_router(rearrange(active, "r ... e -> (...) (r e)").to(probs_NJ))
        if logits is not None:
            z_NR = rearrange(logits, "r ... e -> (...) r e").to(probs_NJ).logsumexp(-1)
            squared_z_R = weight_N @ z_NR.square()
        tokens_R1 = weight_N.sum().expand(n_routers, 1)
        return RouterSums(
            tokens_R1, by_router(probs_NJ), weight_N @ entropy_NR, active_RE, squared_z_R
        )


def over_ranks(sums: Sequence[RouterSums], group: dist.ProcessGroup | None) -> list[RouterSums]:
    """The same sums over the tokens of all ranks, in one communication; see `sum_over_ranks`.

    Args:
        sums: of groups of routers, which are the same on every rank.
        group: the ranks; None for this one alone.
    """
    if group is None:
        return list(sums)
    parts = [part for each in sums for part in each if part is not None]
    total = sum_over_ranks(torch.cat([part.flatten() for part in parts]), group)
    summed = iter(total.split([part.numel() for part in parts]))
    return [each.map(lambda part: next(summed).view_as(part)) for each in sums]


def joined(sums: Sequence[RouterSums]) -> RouterSums:
    """The sums of several groups of routers, one group after the other."""
    parts = (torch.cat(each) if None not in each else None for each in zip(*sums, strict=True))
    return RouterSums(*parts)  # type: ignore[arg-type]

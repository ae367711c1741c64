"""The load-balancing loss of sparsely trained mixtures.

Shapes: R routers, E experts; leading dimensions (tokens) are free.
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_dsmoe.losses.router_sums import RouterSums, over_ranks, router_sums


def load_balancing_loss(
    probs: Tensor, active: Tensor, mask: Tensor | None = None, *, group: ProcessGroup | None = None
) -> Tensor:
    """Load-balancing loss of the Switch Transformer: E sum_i f_i P_i, 1 when balanced, for any k.

    f_i is expert i's share of all the assignments, P_i its mean probability (arXiv 2101.03961,
    eqs. 4 to 6; f_i is divided by k so that the value does not depend on it).

    Args:
        probs: router probabilities, `[..., E]`.
        active: the experts that ran, bool `[..., E]`, as `TopK(k).mask(probs)` gives.
        mask: tokens that count, `[...]`; None counts all. No token counting gives 0.
        group: process group whose ranks share f_i and P_i, as in `mutual_information_loss`.

    Returns:
        A scalar of at least float32.

    Raises:
        ValueError: if the shapes differ or the mask does not cover the tokens.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.losses import load_balancing_loss
        >>> from lightning_dsmoe.routing import TopK
        >>> balanced = torch.tensor([[0.7, 0.3], [0.3, 0.7]])
        >>> round(load_balancing_loss(balanced, TopK(1).mask(balanced)).item(), 3)
        1.0
        >>> collapsed = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
        >>> round(load_balancing_loss(collapsed, TopK(1).mask(collapsed)).item(), 3)
        1.8
    """
    if active.shape != probs.shape:
        raise ValueError(f"active of {tuple(active.shape)} for probs of {tuple(probs.shape)}")
    return load_balancing_losses(probs[None], active[None], mask, group=group).squeeze(0)


def load_balancing_losses(
    probs: Tensor, active: Tensor, mask: Tensor | None = None, *, group: ProcessGroup | None = None
) -> Tensor:
    """The load-balancing losses of several routers, in one pass.

    Args:
        probs: probabilities of R routers over the same tokens, `[R, ..., E]`.
        active: the experts that ran, bool `[R, ..., E]`.
        mask: tokens that count, `[...]`, as in `load_balancing_loss`.
        group: process group whose ranks share f_i and P_i, as in `mutual_information_loss`.

    Returns:
        One loss for each router, `[R]`.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.losses import load_balancing_losses
        >>> probs = torch.full((3, 5, 4), 0.25)  # 3 routers, 5 tokens, 4 experts
        >>> load_balancing_losses(probs, probs > 0).tolist()
        [1.0, 1.0, 1.0]
    """
    (sums,) = over_ranks([router_sums(probs, mask, active=active)], group)
    return load_balancing_of(sums)


def load_balancing_of(sums: RouterSums) -> Tensor:
    """The load-balancing losses `[R]` of some routers, from their sums over tokens."""
    assert sums.active is not None
    share_RE = sums.active / sums.active.sum(-1, keepdim=True).clamp_min(1)
    prob_RE = sums.probs / sums.tokens.clamp_min(1)
    loss_R: Tensor = prob_RE.shape[-1] * (share_RE * prob_RE).sum(-1)
    return loss_R

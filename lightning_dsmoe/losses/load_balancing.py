"""The balance loss of sparsely trained mixtures.

Shapes: R routers, N tokens, E experts, J = R E; leading dimensions (tokens) are free.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dsmoe.losses.token_sums import flatten_tokens, sum_over_ranks
from lightning_dsmoe.precision import without_autocast


def load_balancing_loss(
    probs: Tensor,
    active: Tensor,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Loss of the Switch Transformer: E sum_i f_i P_i, which is 1 when balanced, for any k.

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
    """
    if active.shape != probs.shape:
        raise ValueError(f"active of {tuple(active.shape)} for probs of {tuple(probs.shape)}")
    return load_balancing_losses(probs[None], active[None], mask, group=group).squeeze(0)


def load_balancing_losses(
    probs: Tensor,
    active: Tensor,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The balance losses of several routers at once: `[R]`.

    Args:
        probs: probabilities of R routers over the same tokens, `[R, ..., E]`.
        active: the experts that ran, bool `[R, ..., E]`.
        mask: tokens that count, `[...]`, as in `load_balancing_loss`.
        group: process group whose ranks share f_i and P_i, as in `mutual_information_loss`.
    """
    n_routers, n_experts = probs.shape[0], probs.shape[-1]
    probs_NJ, weight_N = flatten_tokens(probs.movedim(0, -2).flatten(-2), mask)
    active_NJ = active.movedim(0, -2).reshape(probs_NJ.shape).to(probs_NJ)
    with without_autocast(probs.device.type):
        totals = torch.cat([weight_N @ active_NJ, weight_N @ probs_NJ, weight_N.sum()[None]])
        totals = sum_over_ranks(totals, group)
        assigned_RE, prob_RE = totals[:-1].view(2, n_routers, n_experts)
        share_RE = assigned_RE / assigned_RE.sum(-1, keepdim=True).clamp_min(1)
        loss_R: Tensor = n_experts * (share_RE * prob_RE).sum(-1) / totals[-1].clamp_min(1)
        return loss_R

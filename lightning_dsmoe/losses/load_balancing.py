"""The balance loss of sparsely trained mixtures.

Shapes: R routers, X tokens, N experts, J = R N; leading dimensions (tokens) are free.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dsmoe.losses.masking import flatten_tokens
from lightning_dsmoe.losses.ranks import sum_over_ranks
from lightning_dsmoe.precision import without_autocast


def load_balancing_loss(
    probs: Tensor,
    active: Tensor,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Loss of the Switch Transformer: N sum_i f_i P_i, which is 1 when balanced, for any k.

    f_i is expert i's share of all the assignments, P_i its mean probability (arXiv 2101.03961,
    eqs. 4 to 6; f_i is divided by k so that the value does not depend on it).

    Args:
        probs: router probabilities, `[..., N]`.
        active: the experts that ran, bool `[..., N]`, as `TopK(k).mask(probs)` gives.
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
        probs: probabilities of R routers over the same tokens, `[R, ..., N]`.
        active: the experts that ran, bool `[R, ..., N]`.
        mask: tokens that count, `[...]`, as in `load_balancing_loss`.
        group: process group whose ranks share f_i and P_i, as in `mutual_information_loss`.
    """
    n_routers, n_experts = probs.shape[0], probs.shape[-1]
    probs_XJ, weight_X = flatten_tokens(probs.movedim(0, -2).flatten(-2), mask)
    active_XJ = active.movedim(0, -2).reshape(probs_XJ.shape).to(probs_XJ)
    with without_autocast(probs.device.type):
        totals = torch.cat([weight_X @ active_XJ, weight_X @ probs_XJ, weight_X.sum()[None]])
        totals = sum_over_ranks(totals, group)
        assigned_RN, prob_RN = totals[:-1].view(2, n_routers, n_experts)
        share_RN = assigned_RN / assigned_RN.sum(-1, keepdim=True).clamp_min(1)
        loss_R: Tensor = n_experts * (share_RN * prob_RN).sum(-1) / totals[-1].clamp_min(1)
        return loss_R

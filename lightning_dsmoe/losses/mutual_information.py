"""The mutual-information loss, which keeps experts specialised and balanced, and its entropies.

Shapes: R routers, N tokens, E experts, J = R E; leading dimensions of public arguments are free.
"""

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


class RoutingEntropies(NamedTuple):
    """How uncertain routing is for one token, and how even over all tokens, in nats.

    Their difference, `conditional - marginal`, is the mutual-information loss.

    Shape:
        conditional: mean_x H(e|x), 0 if every token has one expert with probability 1.
        marginal: H(e), ln E if all experts are used equally.
    """

    conditional: Tensor
    marginal: Tensor


def mutual_information_loss(
    probs: Tensor, mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Negative mutual information of tokens and experts of one router, in nats.

    L_MI = mean_x H(e|x) - H(e), p(e) = mean_x S(x)   (arXiv 2404.05567, eqs. 4 and 5)

    Minimising it makes routing confident for each token and balanced over all of them; it lies in
    [-ln E, 0]. Sum it over the routers of a model.

    Args:
        probs: router probabilities S, `[..., E]`.
        mask: tokens that count, `[...]`, bool or 0/1; None counts all. No token counting gives 0.
        group: process group whose ranks share p(e), since the loss is not linear in it. Every rank
            then gets the loss of all the tokens, and gradients are right once averaged over the
            ranks, as DDP and FSDP do. None: the local tokens only.

    Returns:
        A scalar of at least float32.

    Raises:
        ValueError: if the mask does not cover the tokens.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe import mutual_information_loss
        >>> specialised = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # one expert for each token
        >>> round(mutual_information_loss(specialised).item(), 3)  # -ln 2
        -0.693
        >>> uncertain = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> round(abs(mutual_information_loss(uncertain).item()), 3)
        0.0
    """
    conditional, marginal = routing_entropies(probs[None], mask, group=group)
    return (conditional - marginal).squeeze(0)


def routing_entropies(
    probs: Tensor, mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None
) -> RoutingEntropies:
    """The two entropies of the mutual-information loss of several routers, in one pass.

    Args:
        probs: router probabilities S of R routers over the same tokens, `[R, ..., E]`.
        mask: tokens that count, `[...]`, as in `mutual_information_loss`.
        group: process group whose ranks share p(e), as in `mutual_information_loss`.

    Returns:
        Two tensors `[R]`.

    Raises:
        ValueError: if the mask does not cover the tokens.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.losses import routing_entropies
        >>> probs = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # one router, two tokens
        >>> conditional, marginal = routing_entropies(probs)
        >>> conditional.item(), round(marginal.item(), 3)
        (0.0, 0.693)
    """
    n_routers, n_experts = probs.shape[0], probs.shape[-1]
    probs_NJ, weight_N = flatten_tokens(rearrange(probs, "r ... e -> ... (r e)"), mask)
    entropy_NR = entropy(rearrange(probs_NJ, "n (r e) -> n r e", r=n_routers))
    with without_autocast(probs.device.type):
        totals = torch.cat([weight_N @ probs_NJ, weight_N @ entropy_NR, weight_N.sum()[None]])
    totals = sum_over_ranks(totals, group)
    means = totals[:-1] / totals[-1].clamp_min(1)
    share_J, conditional_R = means.split([n_routers * n_experts, n_routers])
    return RoutingEntropies(conditional_R, entropy(rearrange(share_J, "(r e) -> r e", r=n_routers)))

"""The mutual-information loss, which keeps experts specialised and balanced, and its entropies.

Shapes: R routers, E experts; leading dimensions (tokens) are free.
"""

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from lightning_dsmoe.losses.router_sums import RouterSums, entropy, over_ranks, router_sums


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
    (sums,) = over_ranks([router_sums(probs, mask)], group)
    return entropies_of(sums)


def entropies_of(sums: RouterSums) -> RoutingEntropies:
    """The two entropies of some routers, from their sums over tokens."""
    count_R1 = sums.tokens.clamp_min(1)
    return RoutingEntropies(sums.entropies / count_R1[:, 0], entropy(sums.probs / count_R1))

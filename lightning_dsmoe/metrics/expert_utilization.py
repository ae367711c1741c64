"""How a router uses its experts.

Shapes: N tokens, E experts; leading dimensions (tokens) are free.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dsmoe.losses import entropy
from lightning_dsmoe.losses.token_sums import flatten_tokens
from lightning_dsmoe.precision import without_autocast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

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
    return _compute(*_update(probs, mask), dead_share)


class ExpertUtilization(Metric):
    """Gate shares, entropies and dead experts of a router, over batches and over ranks.

    `update` takes router probabilities `[..., E]` and optionally a mask `[...]`; `compute` returns
    a `Utilization` over all tokens since the last reset. `expert_utilization` is the function for
    one batch, with the formulas.

    Args:
        n_experts: number of experts E.
        dead_share: an expert is dead if its gate share is at most this fraction of 1/E.
        **options: options of every torchmetrics `Metric`, such as `sync_on_compute=False` for a
            metric that only one rank computes.

    Raises:
        ValueError: if `n_experts` is below 1 or `dead_share` not in [0, 1).

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.metrics import ExpertUtilization
        >>> metric = ExpertUtilization(n_experts=2)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]))
        >>> metric.update(torch.tensor([[0.2, 0.8]]))
        >>> used = metric.compute()
        >>> used.share
        tensor([0.6000, 0.4000])
        >>> print(f"H(e) {used.entropy:.3f}, H(e|x) {used.conditional_entropy:.3f} nats")
        H(e) 0.673, H(e|x) 0.479 nats
    """

    is_differentiable = False
    full_state_update = False

    gates: Tensor
    conditional_entropies: Tensor
    tokens: Tensor

    def __init__(self, n_experts: int, *, dead_share: float = DEAD_SHARE, **options: Any) -> None:
        super().__init__(**options)
        if n_experts < 1 or not 0 <= dead_share < 1:
            raise ValueError(
                "n_experts must be at least 1 and dead_share in [0, 1), "
                f"got {n_experts} and {dead_share}"
            )
        self.n_experts = n_experts
        self.dead_share = dead_share
        self.add_state("gates", torch.zeros(n_experts), dist_reduce_fx="sum")
        self.add_state("conditional_entropies", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probs: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of a batch.

        Args:
            probs: router probabilities, `[..., E]`, float.
            mask: tokens that count, `[...]`, bool or 0/1; None counts all.

        Raises:
            ValueError: if the shape of the mask is not that of the tokens.
        """
        gates, conditional_entropies, tokens = _update(probs, mask)
        self.gates += gates
        self.conditional_entropies += conditional_entropies
        self.tokens += tokens

    def compute(self) -> Utilization:
        """Utilization over all tokens since the last reset."""
        return _compute(self.gates, self.conditional_entropies, self.tokens, self.dead_share)

    def plot(
        self, val: Utilization | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | SubFigure, Axes]":
        """Draw the gate shares as bars, with a line at an even share.

        Args:
            val: utilization to draw; None draws that of `compute`.
            ax: axes to draw on; None makes a figure.

        Returns:
            The figure and its axes.
        """
        from matplotlib.figure import Figure

        used = self.compute() if val is None else val
        axes = Figure(layout="constrained").subplots() if ax is None else ax
        share = used.share.reshape(-1).cpu()
        axes.bar(range(len(share)), share.tolist())
        axes.axhline(1 / len(share), color="black", linestyle="--", label="even share, 1/E")
        axes.set(
            xlabel="expert",
            ylabel="gate share",
            title=f"{used.effective.item():.3g} effective experts of {len(share)}",
        )
        axes.legend()
        return axes.figure, axes


def _update(probs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the gates `[E]`, sum of the tokens' entropies, number of tokens."""
    probs_NE, weight_N = flatten_tokens(probs.detach(), mask)
    with without_autocast(probs.device.type):
        return weight_N @ probs_NE, weight_N @ entropy(probs_NE), weight_N.sum().long()


def _compute(
    gates: Tensor, conditional_entropies: Tensor, tokens: Tensor, dead_share: float
) -> Utilization:
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

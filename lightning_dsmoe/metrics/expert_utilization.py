"""How a router uses its experts.

Shapes: N tokens, E experts; leading dimensions (tokens) are free.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dsmoe.losses import entropy
from lightning_dsmoe.losses.masking import flatten_tokens
from lightning_dsmoe.precision import without_autocast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

DEAD_SHARE = 0.01
"""An expert is dead if its share of the gates is at most this fraction of an even share."""


class Utilization(NamedTuple):
    """How a router uses its experts, over some tokens; entropies in nats.

    Without any gate or token, shares, entropies and effective experts are 0 and all experts dead.

    Shape:
        share: `[E]`, mean gate of each expert, p(e).
        effective: number of evenly used experts with the same entropy, exp H(e), from 1 to E.
        entropy: H(e), of the shares; ln E when the use is even.
        conditional_entropy: mean of H(e|x) over tokens; 0 when every choice is sharp.
        dead: bool `[E]`, the experts whose share is at most a small fraction of 1/E.
    """

    share: Tensor
    effective: Tensor
    entropy: Tensor
    conditional_entropy: Tensor
    dead: Tensor

    @property
    def dead_experts(self) -> list[int]:
        """Numbers of the dead experts."""
        numbers: list[int] = self.dead.reshape(-1).nonzero().flatten().tolist()
        return numbers


def expert_utilization(
    probs: Tensor, mask: Tensor | None = None, *, dead_share: float = DEAD_SHARE
) -> Utilization:
    """How a router with these probabilities uses its experts.

    Args:
        probs: router probabilities, `[..., E]`.
        mask: tokens that count, `[...]`, bool or 0/1; None counts all.
        dead_share: an expert is dead if its share is at most this fraction of 1/E.

    Raises:
        ValueError: if the mask does not cover the tokens.
    """
    return _compute(*_update(probs, mask), dead_share)


class ExpertUtilization(Metric):
    """How a router uses its experts, over batches and over ranks.

    Args:
        n_experts: number of experts E.
        dead_share: an expert is dead if its share is at most this fraction of 1/E.
        **options: those of every torchmetrics `Metric`, such as `sync_on_compute=False` for a
            metric that only one rank computes.

    Raises:
        ValueError: if `n_experts` is below 1 or `dead_share` not in [0, 1).
    """

    is_differentiable = False
    higher_is_better = None
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
        """Count tokens with router probabilities `[..., E]`, of which `mask` `[...]` count."""
        gates, conditional_entropies, tokens = _update(probs, mask)
        self.gates += gates
        self.conditional_entropies += conditional_entropies
        self.tokens += tokens

    def compute(self) -> Utilization:
        """Utilization over all tokens counted since the last reset."""
        return _compute(self.gates, self.conditional_entropies, self.tokens, self.dead_share)

    def plot(
        self, val: Utilization | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | SubFigure, Axes]":
        """Bars of the gate shares beside the even share.

        Args:
            val: what to draw; None draws what `compute` gives.
            ax: axes to draw on; None makes a figure.
        """
        from matplotlib.figure import Figure

        used = self.compute() if val is None else val
        axes = Figure(layout="constrained").subplots() if ax is None else ax
        share = used.share.reshape(-1).cpu()
        axes.bar(range(len(share)), share.tolist())
        axes.axhline(1 / len(share), color="black", linestyle="--", label="even use")
        axes.set(
            xlabel="expert",
            ylabel="share of the gates",
            title=f"{used.effective.item():.1f} of {len(share)} experts effective",
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

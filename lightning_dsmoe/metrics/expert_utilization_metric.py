"""How a router uses its experts, over batches and ranks.

Shapes: E experts; leading dimensions (tokens) are free.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dsmoe.metrics.expert_utilization import (
    DEAD_SHARE,
    Utilization,
    utilization_of_sums,
    utilization_sums,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


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
        gates, conditional_entropies, tokens = utilization_sums(probs, mask)
        self.gates += gates
        self.conditional_entropies += conditional_entropies
        self.tokens += tokens

    def compute(self) -> Utilization:
        """Utilization over all tokens since the last reset."""
        return utilization_of_sums(
            self.gates, self.conditional_entropies, self.tokens, self.dead_share
        )

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

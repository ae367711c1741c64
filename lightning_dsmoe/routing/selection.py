"""Selections decide which experts run; routers only score them.

Shapes: E experts; leading dimensions are free. At least one expert of every token always runs;
ties go to the expert with the lower number.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.reading import shown

_MAX_TOKENS_COUNTED = 16
"""Up to so many tokens, ranks are found by counting; see `_ahead`."""


class Gates(NamedTuple):
    """The gates of the experts that run, and which ones do.

    Shape:
        weight: `[..., E]`, the gate of each expert, zero where it does not run.
        active: bool `[..., E]`, the experts that run.
    """

    weight: Tensor
    active: Tensor


@dataclass(frozen=True)
class Selection(ABC):
    """Decides from a token's probabilities S which experts run.

    Subclass it as a frozen dataclass and define `mask` for a selection of your own. Called on
    probabilities `[..., E]`, a selection returns `Gates`.

    Args:
        renormalize: divide the gates of the experts that run by their sum; false leaves them as
            they are, which is what arXiv 2404.05567 does.

    Examples:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class NearBest(Selection):
        ...     share: float
        ...
        ...     def mask(self, probs):
        ...         return probs >= self.share * probs.amax(-1, keepdim=True)
        >>> probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
        >>> NearBest(0.5)(probs).active.tolist()
        [[True, True, False, False]]
    """

    renormalize: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.renormalize, bool):
            raise ValueError(f"renormalize must be true or false, got {shown(self.renormalize)}")

    @abstractmethod
    def mask(self, probs: Tensor) -> Tensor:
        """The experts that run: float `[..., E]` to bool `[..., E]`, one or more in each row."""

    def check(self, n_experts: int) -> None:
        """Raise a ValueError if this selection is impossible for `n_experts` experts."""
        del n_experts

    def __call__(self, probs: Tensor) -> Gates:
        """Gates of the experts that run, from probabilities `[..., E]`."""
        active = self.mask(probs)
        return Gates(self.weigh(probs, active), active)

    def weigh(self, probs: Tensor, active: Tensor) -> Tensor:
        """Gates `[..., E]`: the probabilities of active experts, zero for the others."""
        weight = probs.masked_fill(~active, 0.0)
        return weight / weight.sum(-1, keepdim=True) if self.renormalize else weight


def check_selection(selection: object) -> None:
    """Raise a TypeError that names what was meant, unless it can be called as a selection is."""
    if callable(selection) and not isinstance(selection, type):
        return
    if isinstance(selection, type):
        meant = f"{selection.__name__}(...) rather than the class"
    else:
        meant = f"TopK({selection})" if isinstance(selection, int) else "TopK(2) or Threshold(0.5)"
    raise TypeError(f"a selection chooses experts, such as {meant}; got {selection!r:.80}")


@dataclass(frozen=True)
class AllExperts(Selection):
    """Runs every expert: the dense model (arXiv 2404.05567, eq. 3).

    Examples:
        >>> import torch
        >>> AllExperts()(torch.tensor([0.75, 0.25])).weight.tolist()
        [0.75, 0.25]
    """

    def mask(self, probs: Tensor) -> Tensor:
        """All true."""
        return torch.ones_like(probs, dtype=torch.bool)

    def __call__(self, probs: Tensor) -> Gates:
        """The probabilities themselves."""
        return Gates(probs, self.mask(probs))


@dataclass(frozen=True)
class TopK(Selection):
    """Runs the k most probable experts of every token.

    Args:
        k: number of experts, from 1 to E.
        renormalize: divide the gates of the experts that run by their sum.

    Examples:
        >>> import torch
        >>> probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
        >>> TopK(2)(probs).active.tolist()
        [[True, True, False, False]]
    """

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"TopK needs a whole number k >= 1, got k={shown(self.k)}")

    def check(self, n_experts: int) -> None:
        """Raise a ValueError if k exceeds `n_experts`."""
        if self.k > n_experts:
            raise ValueError(f"TopK(k={self.k}) needs k <= {n_experts}, the number of experts")

    def mask(self, probs: Tensor) -> Tensor:
        """The k largest of each row."""
        self.check(probs.shape[-1])
        return rank(probs) < self.k


@dataclass(frozen=True)
class Threshold(Selection):
    """Runs the experts with E S_i > eps, and always the most probable one.

    Args:
        eps: threshold on E S_i, the probability relative to its mean 1 / E (arXiv 2404.05567,
            section 3.3); from 0 to below E.
        renormalize: divide the gates of the experts that run by their sum.

    Examples:
        >>> import torch
        >>> probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
        >>> Threshold(0.5)(probs).active.tolist()  # 4 experts: probabilities above 0.5 / 4 = 0.125
        [[True, True, True, False]]
    """

    eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eps, bool) or not 0 <= self.eps < math.inf:
            raise ValueError(f"{type(self).__name__} needs 0 <= eps < E, got eps={shown(self.eps)}")

    def check(self, n_experts: int) -> None:
        """Raise a ValueError if no gate of `n_experts` experts could pass."""
        if self.eps >= max(n_experts, 1):
            raise ValueError(
                f"{type(self).__name__}(eps={self.eps}) compares with E*S, "
                f"so eps must be below E={n_experts}"
            )

    def mask(self, probs: Tensor) -> Tensor:
        """E S_i > eps, and the arg-max."""
        self.check(probs.shape[-1])
        return above_threshold(probs, self.eps)


@dataclass(frozen=True)
class ThresholdTopK(Threshold):
    """Runs the k most probable experts, k being the mean number above a threshold in the batch.

    k is rounded to the nearest whole number, at least 1, for each layer and call by itself
    (arXiv 2404.05567, section 3.3). Every position of the batch counts, padding too.

    Args:
        eps: threshold on E S_i, the probability relative to its mean 1 / E; from 0 to below E.
        renormalize: divide the gates of the experts that run by their sum.

    Examples:
        >>> import torch
        >>> probs = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.3, 0.3, 0.3, 0.1]])
        >>> ThresholdTopK(1.0)(probs).active.sum(-1).tolist()  # 1 and 3 experts are above: k = 2
        [2, 2]
    """

    def mask(self, probs: Tensor) -> Tensor:
        """The top k of each row with k from the whole batch."""
        self.check(probs.shape[-1])
        if probs.numel() == 0:
            return torch.ones_like(probs, dtype=torch.bool)
        return mean_number_above_threshold(probs, self.eps)


@dataclass(frozen=True)
class TopP(Selection):
    """Runs the fewest most probable experts whose probabilities reach a total of p.

    Args:
        p: probability mass to keep, above 0 and at most 1.
        renormalize: divide the gates of the experts that run by their sum.

    Examples:
        >>> import torch
        >>> probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
        >>> TopP(0.7)(probs).active.tolist()
        [[True, True, False, False]]
    """

    p: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.p, bool) or not 0 < self.p <= 1:
            raise ValueError(f"TopP needs 0 < p <= 1, got p={shown(self.p)}")

    def mask(self, probs: Tensor) -> Tensor:
        """The shortest prefix of the sorted row that holds p."""
        if self.p == 1:
            return torch.ones_like(probs, dtype=torch.bool)
        return shortest_prefix(probs, self.p)


WORDS: dict[type[Selection], str] = {
    AllExperts: "all",
    TopK: "top",
    Threshold: "threshold",
    ThresholdTopK: "threshold top-k",
    TopP: "top-p",
}
"""What a plan in words calls a selection; its one number, if any, follows."""


def rank(probs: Tensor) -> Tensor:
    """Rank of each expert in its row `[..., E]`, 0 for the largest; lower numbers win ties."""
    ahead = _ahead(probs)
    if ahead is not None:
        return ahead.sum(-1)
    order = probs.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(probs.shape[-1], device=probs.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _ahead(probs: Tensor) -> Tensor | None:
    """Whether expert j is ranked before expert i, bool `[..., i, j]`; None for many tokens.

    For few tokens, counting who is ahead beats sorting, and a compiler makes one loop of it; a sort
    breaks the loop in two and calls a kernel of its own. For many tokens E^2 comparisons cost more.
    """
    n_experts = probs.shape[-1]
    if probs.numel() > _MAX_TOKENS_COUNTED * n_experts:
        return None
    places = torch.arange(n_experts, device=probs.device)
    own, other = probs[..., :, None], probs[..., None, :]
    return (other > own) | ((other == own) & (places < places[:, None]))


def above_threshold(probs: Tensor, eps: float | Tensor) -> Tensor:
    """Experts with E S_i > eps, and the arg-max of each row."""
    best = probs.argmax(-1, keepdim=True)  # the first of equal ones
    places = torch.arange(probs.shape[-1], device=probs.device)
    return (probs * probs.shape[-1] > eps) | (places == best)


def mean_number_above_threshold(probs: Tensor, eps: float | Tensor) -> Tensor:
    """The k most probable experts of each row, k being the mean number above a threshold."""
    k = above_threshold(probs, eps).sum(-1).double().mean().round()
    return rank(probs) < k


def shortest_prefix(probs: Tensor, p: float | Tensor) -> Tensor:
    """The fewest most probable experts of each row whose probabilities reach a total of p."""
    ahead = _ahead(probs)
    if ahead is not None:
        before = torch.where(ahead, probs[..., None, :], 0.0).sum(-1)
        return (before < p) | ~ahead.any(-1)
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = before < p
    kept[..., :1] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)

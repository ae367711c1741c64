"""Selections among some experts of a mixture, by loops."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dsmoe.routing import (
    AllExperts,
    Gates,
    Selection,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

SELECTIONS: list[Selection] = [
    AllExperts(),
    AllExperts(renormalize=True),
    TopK(1),
    TopK(2),
    TopK(3, renormalize=True),
    Threshold(0.0),
    Threshold(0.8),
    Threshold(2.5),
    Threshold(0.8, renormalize=True),
    ThresholdTopK(0.8),
    ThresholdTopK(0.8, renormalize=True),
    TopP(0.6),
    TopP(1.0),
    TopP(0.6, renormalize=True),
]


class Among:
    """A selection that chooses among some experts of a whole mixture."""

    def __init__(self, selection: Selection, remaining: Sequence[int]) -> None:
        self.selection = selection
        self.remaining = remaining

    def __call__(self, probs: Tensor) -> Gates:
        rows = probs.flatten(0, -2)
        count = round(
            sum(len(above(self.remaining, row.tolist(), self.selection)) for row in rows)
            / max(1, len(rows))
        )
        weight, active = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        for number, row in enumerate(rows.tolist()):
            chosen = self.chosen(row, count)
            total = sum(row[e] for e in chosen) if self.selection.renormalize else 1.0
            for e in chosen:
                weight[number, e], active[number, e] = row[e] / total, True
        return Gates(weight.view_as(probs), active.view_as(probs))

    def chosen(self, row: list[float], count: int) -> list[int]:
        ranked = sorted(self.remaining, key=lambda e: (-row[e], e))
        match self.selection:
            case AllExperts():
                return ranked
            case TopK():
                return ranked[: self.selection.k]
            case ThresholdTopK():
                return ranked[:count]
            case Threshold():
                return above(self.remaining, row, self.selection)
            case TopP():
                ahead = [sum(row[e] for e in ranked[:place]) for place in range(len(ranked))]
                p = self.selection.p
                return [e for e, mass in zip(ranked, ahead, strict=True) if mass < p or p == 1]
        raise AssertionError(self.selection)


def above(remaining: Sequence[int], row: list[float], selection: Selection) -> list[int]:
    if not isinstance(selection, Threshold):
        return []
    best = max(remaining, key=lambda e: (row[e], -e))
    return [e for e in remaining if len(row) * row[e] > selection.eps or e == best]

"""What experts and selections are called, and what a model has of them."""

from collections.abc import Sequence
from dataclasses import asdict

from lightning_dsmoe.analysis.report.utilization import ModelUse, RouterUse, routers
from lightning_dsmoe.routing import Selection

KINDS = "feed-forward experts", "attention experts"


def kinds(use: ModelUse) -> list[tuple[str, list[RouterUse | None]]]:
    """The kinds of experts that a model has, by name."""
    return [
        (name, layers)
        for name, layers in zip(KINDS, (use.experts, use.attention), strict=True)
        if routers(layers)
    ]


def count_experts(use: ModelUse) -> int:
    """Experts of all layers and of both kinds."""
    return sum(len(router.running_E) for _, layers in kinds(use) for _, router in routers(layers))


def mean_effective(layers: Sequence[RouterUse | None]) -> tuple[float, float]:
    """Effective experts and all experts, both in the mean over layers."""
    found = [router for _, router in routers(layers)]
    effective = sum(router.gates.effective.item() for router in found)
    return effective / len(found), sum(len(router.running_E) for router in found) / len(found)


def selection_label(selection: Selection) -> str:
    """A selection in a few words, such as "Threshold eps=0.1"."""
    options = {key: value for key, value in asdict(selection).items() if value is not False}
    words = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in options.items()]
    return " ".join([type(selection).__name__, *words])


def plan_label(selections: Sequence[Selection]) -> str:
    """The selections of all layers in a few words."""
    labels = {selection_label(selection) for selection in selections}
    return labels.pop() if len(labels) == 1 else "a selection for each layer"

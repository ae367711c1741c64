"""Shares of the gates of all experts as heat maps, and how they changed.

Shapes: E experts.
"""

from collections.abc import Sequence

from lightning_dsmoe.analysis.report.drift import Drift, RouterDrift
from lightning_dsmoe.analysis.report.heat_map import (
    change,
    change_scale,
    heat_map,
    level,
    level_scale,
)
from lightning_dsmoe.analysis.report.naming import KINDS, kinds
from lightning_dsmoe.analysis.report.utilization import ModelUse, RouterUse

_LEAST_CHANGE = 0.01


def gate_maps(use: ModelUse) -> str:
    """Share of the gates of every expert."""
    return "".join(_gate_map(name, layers) for name, layers in kinds(use))


def drift_maps(drift: Drift) -> str:
    """Change of the share of the gates of every expert, and tokens that changed their expert."""
    return "".join(
        _drift_map(name, layers) + _moved(layers)
        for name, layers in zip(KINDS, (drift.experts, drift.attention), strict=True)
        if any(router is not None for router in layers)
    )


def _gate_map(name: str, layers: Sequence[RouterUse | None]) -> str:
    shares = [None if router is None else router.gates.share for router in layers]
    most = max(2.0, *(float(s.max()) * len(s) for s in shares if s is not None))
    return (
        f"<h3>{name.capitalize()}</h3>"
        + heat_map(
            shares,
            lambda share, n: level(share * n, most),
            lambda share: f"{100 * share:.1f}",
            lambda share, n: f"{share:.2%} of the gates, {share * n:.2f} times an even share",
            label=f"share of the gates in percent, {name}",
        )
        + level_scale("nothing", f"{most:.1f} times an even share")
    )


def _drift_map(name: str, layers: Sequence[RouterDrift | None]) -> str:
    changes = [None if router is None else router.change_E for router in layers]
    most = max(_LEAST_CHANGE, *(float(c.abs().max()) for c in changes if c is not None))
    return (
        f"<h3>{name.capitalize()}</h3>"
        + heat_map(
            changes,
            lambda value, n: change(value, most),
            lambda value: f"{100 * value:+z.1f}",
            lambda value, n: f"{100 * value:+z.2f} percentage points of the gates",
            label=f"change of the share of the gates in percentage points, {name}",
        )
        + change_scale(f"{-100 * most:+.1f}", f"{100 * most:+.1f} percentage points")
    )


def _moved(layers: Sequence[RouterDrift | None]) -> str:
    moved = ", ".join(
        f"{router.moved:.1%} in layer {layer}"
        for layer, router in enumerate(layers)
        if router is not None
    )
    return f"<p>Tokens whose most probable expert is another one: {moved}.</p>"

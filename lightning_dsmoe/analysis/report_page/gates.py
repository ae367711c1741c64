"""Shares of the gates of all experts as heat maps, and how they changed.

Shapes: N experts.
"""

from collections.abc import Sequence

from lightning_dsmoe.analysis.drift import Drift, RouterDrift
from lightning_dsmoe.analysis.report_page.heat_map import (
    change,
    change_scale,
    heat_map,
    level,
    level_scale,
)
from lightning_dsmoe.analysis.report_page.naming import KINDS, kinds
from lightning_dsmoe.analysis.utilization import ModelUse

_LEAST_CHANGE = 0.01


def gate_maps(use: ModelUse) -> str:
    """Share of the gates of every expert."""
    parts = []
    for name, layers in kinds(use):
        shares = [None if router is None else router.gates.share for router in layers]
        even = max(2.0, *(float(s.max()) * len(s) for s in shares if s is not None))
        parts.append(
            f"<h3>{name.capitalize()}</h3>"
            + heat_map(
                shares,
                lambda share, n, even=even: level(share * n, even),  # type: ignore[misc]
                lambda share: f"{100 * share:.1f}",
                lambda share, n: f"{share:.2%} of the gates, {share * n:.2f} times an even share",
                label=f"share of the gates in percent, {name}",
            )
            + level_scale("nothing", f"{even:.1f} times an even share")
        )
    return "".join(parts)


def drift_maps(drift: Drift) -> str:
    """Change of the share of the gates of every expert, and tokens that changed their expert."""
    parts = []
    for name, layers in zip(KINDS, (drift.experts, drift.attention), strict=True):
        found = [router for router in layers if router is not None]
        if not found:
            continue
        changes = [None if router is None else router.change_N for router in layers]
        most = max(_LEAST_CHANGE, *(float(c.abs().max()) for c in changes if c is not None))
        parts.append(
            f"<h3>{name.capitalize()}</h3>"
            + heat_map(
                changes,
                lambda value, n, most=most: change(value, most),  # type: ignore[misc]
                lambda value: f"{100 * value:+z.1f}",
                lambda value, n: f"{100 * value:+z.2f} percentage points of the gates",
                label=f"change of the share of the gates in percentage points, {name}",
            )
            + change_scale(f"{-100 * most:+.1f}", f"{100 * most:+.1f} percentage points")
            + _moved(layers)
        )
    return "".join(parts)


def _moved(layers: Sequence[RouterDrift | None]) -> str:
    moved = ", ".join(
        f"{router.moved:.1%} in layer {layer}"
        for layer, router in enumerate(layers)
        if router is not None
    )
    return f"<p>Tokens whose most probable expert is another one: {moved}.</p>"

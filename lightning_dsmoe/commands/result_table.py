"""Results of plans as a table."""

from collections.abc import Iterable

from rich.table import Table

from lightning_dsmoe.analysis import PlanResult
from lightning_dsmoe.units import percent


def result_table(
    title: str, rows: Iterable[tuple[str, PlanResult]], dense: PlanResult, *, speed: bool = False
) -> Table:
    """A table of plans, their losses and what they run.

    Args:
        title: what stands above it.
        rows: names of plans, and what was measured of them.
        dense: what was measured of all experts.
        speed: show tokens per second as well.
    """
    caption = "loss: nats per token; vs all: change from all experts; active: hidden parameters"
    table = Table("plan", "loss", "vs all", "active", "median", "95th pct", title=title)
    table.caption = caption
    if speed:
        table.add_column("tokens/s")
    for name, result in rows:
        cells = [
            name,
            f"{result.loss:.3f}",
            percent(result.loss / dense.loss - 1, sign="+"),
            percent(result.active_share_mean),
            percent(result.active_share_p50),
            percent(result.active_share_p95),
            f"{result.tokens_per_second:,.0f}",
        ]
        table.add_row(*cells[: len(table.columns)])
    return table

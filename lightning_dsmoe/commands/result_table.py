"""Results as people read them: with units, per cent and three significant digits."""

from collections.abc import Iterable

from rich.table import Table

from lightning_dsmoe.analysis import PlanResult


def percent(share: float, *, sign: str = "") -> str:
    """A share in per cent, to three digits and no finer than 0.001 %.

    Args:
        share: the share.
        sign: "+" to mark positive numbers, too.

    Example:
        >>> percent(0.12345), percent(-0.0005), percent(0.0123, sign="+"), percent(1e-9)
        ('12.3 %', '-0.05 %', '+1.23 %', '0 %')
    """
    value = round(100 * share, 3)
    if not value:
        return "0 %"
    return f"{value:{sign}.3g} %" if abs(value) < 999.5 else f"{value:{sign},.0f} %"


def compared(gap: float) -> str:
    """A relative difference in words.

    Example:
        >>> compared(1.411 / 1.4117 - 1), compared(1.5 / 1.411 - 1), compared(0)
        ('0.05 % below', '6.31 % above', '0 % above')
    """
    return f"{percent(abs(gap))} {'below' if gap < 0 else 'above'}"


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

"""Certificates as tables."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_dsmoe.units import compared, percent


def print_certificates(certificates: Mapping[str, Mapping[str, Any]]) -> None:
    """Print certificates side by side, and what the plan changes in each layer of the last one.

    Args:
        certificates: by the heading of their column.
    """
    console = Console()
    table = Table("", *certificates)
    for label, (name, style) in _ROWS.items():
        if any(each[name] is not None for each in certificates.values()):
            values = (each[name] for each in certificates.values())
            table.add_row(label, *("" if value is None else style(value) for value in values))
    console.print(table)
    last = list(certificates.values())[-1]
    layers = _layers(last)
    if layers.row_count:
        console.print(layers)
    print(f"{_headline(last)}.")


def _layers(certificate: Mapping[str, Any]) -> Table:
    columns = ("dropped gates", "max", "error", "max", "bound", "max")
    table = Table(
        "layer", *columns, title="What the plan changes in each layer, mean and max over tokens"
    )
    for kind in ("experts", "attention"):
        for layer, errors in enumerate(certificate[kind]):
            if errors is not None:
                table.add_row(f"{kind} {layer}", *map(percent, errors.values()))
    return table


def _headline(certificate: Mapping[str, Any]) -> str:
    gap, interval = compared(certificate["relative_gap"]), certificate["relative_gap_95"]
    line = f"Loss {certificate['sparse_loss']:.3f} nats per token, {gap} all experts"
    return line if interval is None else f"{line} (95 % interval {_interval(interval)})"


def _interval(ends: Sequence[float]) -> str:
    low, high = (percent(end, sign="+") for end in ends)
    return f"{low.removesuffix(' %')} to {high}"


_LOSS = "{:.3f} nats/token".format
_ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "tokens": ("tokens", "{:,}".format),
    "loss, all experts": ("dense_loss", _LOSS),
    "loss, sparse": ("sparse_loss", _LOSS),
    "loss, sparse vs all": ("relative_gap", partial(percent, sign="+")),
    "95 % interval": ("relative_gap_95", _interval),
    "KL divergence": ("kl", "{:.3g} nats/token".format),
    "same top-1 token": ("top_1_agreement", percent),
    "active share, mean": ("active_share_mean", percent),
    "active share, median": ("active_share_p50", percent),
    "active share, 95th pct": ("active_share_p95", percent),
    "all vs checkpoint": ("all_experts_error", "{:.2g} of top logit".format),
    "loss before int8": ("loss_before_quantization", _LOSS),
    "same experts as before": ("routing_agreement", percent),
}
"""Labels, fields of a certificate, and how their values are written."""

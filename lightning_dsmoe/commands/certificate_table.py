"""Certificates as tables."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_certificates(certificates: Mapping[str, Mapping[str, Any]]) -> None:
    """Print certificates side by side, and the mixtures of the last one.

    Args:
        certificates: by what heads their column.
    """
    console = Console()
    table = Table("", *certificates)
    for label, spelled in _ROWS.items():
        row = [spelled(each) for each in certificates.values()]
        if any(row):
            table.add_row(label, *row)
    console.print(table)
    mixtures = _mixtures(list(certificates.values())[-1])
    if mixtures.row_count:
        console.print(mixtures)


def _mixtures(made: Mapping[str, Any]) -> Table:
    heads = ("dropped mass", "most", "error", "most", "bound", "most")
    table = Table("mixture", *heads)
    for kind in ("experts", "attention"):
        for layer, errors in enumerate(made[kind]):
            if errors is not None:
                table.add_row(f"{kind} {layer}", *(f"{x:.2%}" for x in errors.values()))
    return table


def _number(name: str, spec: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda made: "" if made[name] is None else format(made[name], spec)


def _gap(made: Mapping[str, Any]) -> str:
    spelled = f"{made['relative_gap']:+.3%}"
    if made["relative_gap_95"] is None:
        return spelled
    low, high = made["relative_gap_95"]
    return f"{spelled} ({low:+.3%} to {high:+.3%})"


_ROWS = {
    "tokens": _number("tokens", ","),
    "loss, dense": _number("dense_loss", ".4f"),
    "loss, sparse": _number("sparse_loss", ".4f"),
    "relative gap (95 %)": _gap,
    "KL of next token, nats": _number("kl", ".3g"),
    "same best token": _number("top_1_agreement", ".2%"),
    "active share": _number("active_share_mean", ".1%"),
    "active share, p50": _number("active_share_p50", ".1%"),
    "active share, p95": _number("active_share_p95", ".1%"),
    "all experts against checkpoint": _number("all_experts_error", ".2g"),
    "loss before quantization": _number("loss_before_quantization", ".4f"),
    "same experts after it": _number("routing_agreement", ".2%"),
}

"""Experts that run together, as squares and tables.

Shapes: E experts.
"""

from collections.abc import Callable

from torch import Tensor

from lightning_dsmoe.analysis.report.escaping import escaped
from lightning_dsmoe.analysis.report.heat_map import level, level_scale
from lightning_dsmoe.analysis.report.lift import strongest_pairs
from lightning_dsmoe.analysis.report.naming import kinds
from lightning_dsmoe.analysis.report.utilization import ModelUse, RouterUse, routers

_LARGEST_SQUARE = 32
_PAIRS = 3


def together(use: ModelUse) -> str:
    """How often experts run together, for each layer as a square and its strongest pairs."""
    parts = []
    for name, layers in kinds(use):
        strongest = [
            p.share for _, router in routers(layers) for p in strongest_pairs(router.together_EE, 1)
        ]
        most = max(strongest, default=0.0)
        figures = "".join(_together(name, layer, router, most) for layer, router in routers(layers))
        parts.append(f'<h3>{name.capitalize()}</h3><div class="squares">{figures}</div>')
        if any(_has_square(router) for _, router in routers(layers)):
            parts.append(level_scale("never", f"{most:.2%} of the tokens"))
    return "".join(parts)


def _together(name: str, layer: int, use: RouterUse, most: float) -> str:
    def title(first: int, second: int, share: float) -> str:
        if first == second:
            return f"layer {layer}, expert {first} runs for {share:.2%} of the tokens"
        return f"layer {layer}, experts {second} and {first} run together for {share:.2%}"

    square = ""
    if _has_square(use):
        label = f"how often {name} of layer {layer} run together"
        square = _square(use.together_EE, most, title, label=label)
    rows = "".join(
        f"<tr><td>{pair.first} + {pair.second}</td>"
        f"<td>{pair.share:.2%}</td><td>{pair.lift:.1f}×</td></tr>"
        for pair in strongest_pairs(use.together_EE, _PAIRS)
    )
    table = (
        '<table><thead><tr><th scope="col">Pair</th><th scope="col">Together</th>'
        f'<th scope="col">Lift</th></tr></thead><tbody>{rows}</tbody></table>'
        if rows
        else '<p class="quiet">No two run together.</p>'
    )
    return f'<figure class="square"><figcaption>layer {layer}</figcaption>{square}{table}</figure>'


def _has_square(use: RouterUse) -> bool:
    return len(use.together_EE) <= _LARGEST_SQUARE


def _square(
    share_EE: Tensor, most: float, title: Callable[[int, int, float], str], *, label: str
) -> str:
    """A square whose lower half says how often two experts run together."""
    shares: list[list[float]] = share_EE.tolist()
    cells = [
        _cell(first, second, share, most, title)
        for first, row in enumerate(shares)
        for second, share in enumerate(row)
    ]
    return (
        f'<div class="pairs walk" role="group" aria-label="{escaped(label)}" '
        f'style="--n:{len(shares)}">{"".join(cells)}</div>'
    )


def _cell(
    first: int, second: int, share: float, most: float, title: Callable[[int, int, float], str]
) -> str:
    if second > first:
        return "<i></i>"
    if not share:
        return '<i class="s0"></i>'
    colour = "self" if first == second else level(share, most)
    return f'<i class="{colour}" title="{escaped(title(first, second, share))}"></i>'

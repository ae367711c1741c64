"""Heat maps of the gate shares of all layers and experts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_dsmoe.metrics.expert_utilization import Utilization

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def utilization_figure(
    utilizations: Mapping[str, Mapping[str, Utilization] | Sequence[Utilization | None]],
    *,
    title: str = "",
) -> "Figure":
    """Draw gate shares as heat maps of layers by experts, one for each kind of expert.

    A cell shows the gate share times E, which is 1 for an even share. A cross marks a dead expert,
    and the number at the end of a row is that of the effective experts.

    Args:
        utilizations: for each kind of expert one utilization per layer, by the layers' names, or
            in a list, with None where a layer has no router; a kind without any is left out.
        title: title of the figure.

    Returns:
        The figure, which belongs to no window.

    Raises:
        ValueError: if no layer has a router.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.metrics import expert_utilization, utilization_figure
        >>> used = expert_utilization(torch.rand(8, 4).softmax(-1))
        >>> figure = utilization_figure({"experts": {"encoder.mlp": used}})
        >>> figure.axes[0].get_title()
        'experts'
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = {kind: list(u) for kind, u in utilizations.items() if isinstance(u, Mapping)}
    lists = {k: list(u.values() if isinstance(u, Mapping) else u) for k, u in utilizations.items()}
    rows = {kind: layers for kind, layers in lists.items() if any(layers)}
    if not rows:
        raise ValueError("no layer has a router, so there are no gate shares to draw")
    cells = {kind: _cells(layers) for kind, layers in rows.items()}
    widths = [len(table[0]) for table in cells.values()]
    height = 2 + 0.3 * max(len(table) for table in cells.values())
    labels = 0.07 * sum(max(map(len, each)) for kind, each in names.items() if kind in rows)
    figure = Figure(figsize=(4 + 0.25 * sum(widths) + labels, height), layout="constrained")
    grid = figure.subplots(1, len(rows), squeeze=False, width_ratios=[4 + n for n in widths])
    scale = Normalize(0.0, max(max(map(max, table)) for table in cells.values()))
    for axes, (kind, layers) in zip(grid[0], rows.items(), strict=True):
        axes.imshow(cells[kind], norm=scale, cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set(title=kind, xlabel="expert", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        if kind in names:
            axes.set_yticks(range(len(layers)), names[kind], fontsize="small")
        _annotate(axes, layers)
    colors = ScalarMappable(scale, "viridis")
    figure.colorbar(colors, ax=list(grid[0]), label="gate share × E (1 = even share)")
    figure.suptitle(title)
    return figure


def _cells(layers: Sequence[Utilization | None]) -> list[list[float]]:
    """Rows of equal length; 0 where there is no expert."""
    width = max(used.share.numel() for used in layers if used is not None)
    rows = []
    for used in layers:
        shares = [] if used is None else (used.share.reshape(-1) * used.share.numel()).tolist()
        rows.append(shares + [0.0] * (width - len(shares)))
    return rows


def _annotate(axes: "Axes", layers: Sequence[Utilization | None]) -> None:
    """Mark dead experts and write the number of effective experts after each row."""
    notes = {-0.75: "effective"}
    for layer, used in enumerate(layers):
        if used is not None:
            notes[layer] = f"{used.effective.item():.1f}"
            dead = used.dead_experts
            axes.scatter(dead, [layer] * len(dead), marker="x", color="white", linewidths=1)
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": "small"}
    for y, note in notes.items():
        axes.annotate(note, (1.0, y), xycoords=("axes fraction", "data"), xytext=(4, 0), **style)

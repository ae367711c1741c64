"""A heat map of the gate shares of all layers and experts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_dsmoe.metrics.expert_utilization import Utilization

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def utilization_figure(
    utilizations: Mapping[str, Sequence[Utilization | None]], *, title: str = ""
) -> "Figure":
    """Heat maps of layers by experts, one for each kind of expert.

    A cell is the share of an expert times the number of experts, thus 1 where use is even; a cross
    marks a dead expert, and each row ends in its number of effective experts.

    Args:
        utilizations: for each kind of expert one utilization per layer, None without a router;
            a kind without any router is left out.
        title: title of the figure.

    Raises:
        ValueError: if no layer has a router.
    """
    from matplotlib.figure import Figure

    rows = {kind: list(layers) for kind, layers in utilizations.items() if any(layers)}
    if not rows:
        raise ValueError("no layer has a router, so there is no use of experts to draw")
    n_layers = max(len(layers) for layers in rows.values())
    widths = [_most_experts(layers) for layers in rows.values()]
    figure = Figure(figsize=(3 + 0.25 * sum(widths), 2 + 0.3 * n_layers), layout="constrained")
    grid = figure.subplots(1, len(rows), squeeze=False, width_ratios=[4 + n for n in widths])
    for axes, (kind, layers) in zip(grid[0], rows.items(), strict=True):
        _draw(axes, kind, layers)
    figure.suptitle(title)
    return figure


def _most_experts(layers: Sequence[Utilization | None]) -> int:
    return max(used.share.numel() for used in layers if used is not None)


def _draw(axes: "Axes", kind: str, layers: Sequence[Utilization | None]) -> None:
    from matplotlib.ticker import MaxNLocator

    width = _most_experts(layers)
    cells = [[float("nan")] * width for _ in layers]
    for layer, used in enumerate(layers):
        if used is None:
            continue
        n_experts = used.share.numel()
        cells[layer][:n_experts] = (used.share.reshape(-1).cpu() * n_experts).tolist()
        dead = used.dead_experts
        axes.scatter(dead, [layer] * len(dead), marker="x", color="white", linewidths=1)
        axes.annotate(
            f"{used.effective.item():.1f}",
            (1.0, layer),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    image = axes.imshow(cells, aspect="auto", vmin=0.0, cmap="viridis", interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=kind, xlabel="expert", ylabel="layer")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label="share × experts (1 = even)", pad=0.12)

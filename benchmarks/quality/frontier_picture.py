"""Draw docs/images/frontier.png from the measured table of docs/lab_notes/quality.md.

python -m benchmarks.quality.frontier_picture
"""

import re
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {
    "weak": ("MI weights 0.01", "#00796b"),
    "middle": ("MI weights 0.02", "#e67e22"),
    "strong": ("MI weights 0.05 and 0.1", "#8e44ad"),
}


def curve(rows: list[str], weight: str) -> list[tuple[float, float]]:
    """Active shares in per cent and losses under one threshold for all layers."""
    [header] = [row for row in rows if row.startswith("| loss at an active share of | 12%")][:1]
    [row] = [row for row in rows if row.startswith(f"| DS-MoE, {weight} MI, threshold |")]
    points = []
    for share, cell in zip(header.split("|")[2:-1], row.split("|")[2:-1], strict=True):
        nominal = 100.0 if "all" in share else float(share.strip().rstrip("%"))
        measured = re.search(r"at ([\d.]+)%", cell)
        loss = re.search(r"\*\*([\d.]+)\*\*", cell)
        if loss:
            points.append((float(measured[1]) if measured else nominal, float(loss[1])))
    return points


def dense(rows: list[str], name: str) -> tuple[float, float]:
    """Millions of hidden parameters of a dense model, and its loss."""
    [row] = [row for row in rows if row.startswith(f"| {name} | ")]
    hidden, loss = row.split("|")[4], re.search(r"\*\*([\d.]+)\*\*", row)
    assert loss is not None
    return float(hidden), float(loss[1])


def main() -> None:
    """Write the picture."""
    rows = (DOCS / "lab_notes" / "quality.md").read_text(encoding="utf-8").splitlines()
    twin, twin_loss = dense(rows, "dense")
    small, small_loss = dense(rows, "dense, active size")
    small_share = 100 * small / twin
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(twin_loss, color="black", linestyle="--", linewidth=1.2)
    axes.text(100, twin_loss + 0.002, "dense twin", ha="right", va="bottom", fontsize=10)
    axes.plot(small_share, small_loss, "o", color="#c0392b")
    text = "dense model with a third of the parameters"
    axes.text(small_share + 1.5, small_loss, text, va="center", fontsize=10, color="#c0392b")
    for weight, (label, color) in NAMES.items():
        points = curve(rows, weight)
        axes.plot(*zip(*points, strict=True), "o-", color=color, linewidth=2, markersize=4)
        above = weight != "weak"
        height = points[-1][1] + (0.003 if above else -0.003)
        place = {"ha": "right", "va": "bottom" if above else "top"}
        axes.text(100, height, f"DS-MoE, {label}", color=color, fontsize=10, **place)
    axes.set(xlim=(0, 102), ylim=(1.65, 1.81))
    axes.set_xlabel("hidden parameters that run for a token, %")
    axes.set_ylabel("validation loss, nats per character")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(DOCS / "images" / "frontier.png", dpi=130)


if __name__ == "__main__":
    main()

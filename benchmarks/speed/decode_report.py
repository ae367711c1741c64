"""What `decode.py` found, as tables and a picture."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.speed.sparse_models import PLANS, ds_moe, hidden_share


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    on = results["machine"]
    lines = [
        f"{on['cpu']}, {on['threads']} threads, torch {on['torch']}, {on['date']}",
        "",
        "| one sequence | ms | MB needed | of stream | over twin | quartiles | bound | of bound "
        "| over float32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["one_text"].items():
        low, high = row["spread"]
        lines.append(
            f"| {name} | {row['milliseconds']:.2f} | {row['megabytes']:.1f} "
            f"| {row['over_stream']:.2f} | {row['over_twin']:.2f} | {low:.2f} to {high:.2f} "
            f"| {row['bound']:.2f} | {row['over_bound']:.2f} | {row['over_float32']:.2f} |"
        )
    lines += ["", "| sequences | twin, ms | P1 | P2 | P3 |", "|---|---|---|---|---|"]
    for size, sides in results["batch_sizes"].items():
        ratios = [f"{sides[name]['ratio']:.2f}" for name in ("P1", "P2", "P3")]
        lines.append(f"| {size} | {1e3 * sides['twin']['candidate']:.1f} | {' | '.join(ratios)} |")
    lines += ["", "| active share | tokens/s | over twin |", "|---|---|---|"]
    lines += [
        f"| {row['share']:.1%} | {row['tokens_per_second']:.0f} | {row['over_twin']:.2f} |"
        for row in results["shares"]
    ]
    lines += [
        "",
        "| experts running | 32, ms | 256, ms | ratio of bytes | ratio of times |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {1e3 * row['candidate']:.2f} | {1e3 * row['reference']:.2f} "
        f"| {row['bytes']:.2f} | {row['ratio']:.2f} |"
        for name, row in results["experts"].items()
    ]
    begun = results["start"]
    lines += [
        "",
        f"A new process has its first token after {begun['first_token']:.1f} s, the first one of "
        f"the compiled step after {begun['second_token']:.1f} s.",
    ]
    return "\n".join(lines)


def figure(results: dict[str, Any], path: Path) -> None:
    """Speed over the dense twin's against batch size and against active share."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    batches = results["batch_sizes"]
    decoder = ds_moe()
    for name, plan in PLANS.items():
        ratios = [sides[name]["ratio"] for sides in batches.values()]
        label = f"{name}: {hidden_share(decoder, plan):.0%} active"
        left.plot([int(size) for size in batches], ratios, "o-", markersize=4, label=label)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(ScalarFormatter())
    left.set(xlabel="batch size, sequences", ylabel="speed over the dense twin's")
    rows = results["shares"]
    shares, ratios = [100 * row["share"] for row in rows], [row["over_twin"] for row in rows]
    right.plot(shares, ratios, "o-", markersize=4, label="one sequence")
    right.set(xlabel="active share of the hidden parameters, %", xlim=(0, 104))
    for axes in (left, right):
        axes.axhline(1, color="black", linestyle="--", label="dense twin")
        axes.set(ylim=(0, None))
        axes.legend()
    drawn.savefig(path, dpi=150)

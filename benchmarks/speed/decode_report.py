"""What `decode.py` found, as tables and a picture."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter


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
    """Tokens per second against batch size and against active share."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    sizes = [int(size) for size in results["batch_sizes"]]
    for name in ("twin", "P1", "P2", "P3"):
        rates = [sides[name]["tokens_per_second"] for sides in results["batch_sizes"].values()]
        style = "k--" if name == "twin" else "o-"
        label = "dense twin" if name == "twin" else name
        left.loglog(sizes, rates, style, base=2, markersize=4, label=label)
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    left.set(xlabel="batch size, sequences", ylabel="tokens/s")
    left.legend()
    shares = [100 * row["share"] for row in results["shares"]]
    right.plot(shares, [row["tokens_per_second"] for row in results["shares"]], "o-", markersize=4)
    dense = results["shares"][-1]["tokens_per_second"] / results["shares"][-1]["over_twin"]
    right.axhline(dense, color="black", linestyle="--", label="dense twin")
    right.set(xlabel="active share of the hidden parameters, %", ylabel="tokens/s, one sequence")
    right.set(xlim=(0, 104), ylim=(0, None))
    right.legend()
    drawn.savefig(path, dpi=150)

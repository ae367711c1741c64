"""The tables of docs/results.md from the files of `python -m benchmarks.gpu`.

    python -m benchmarks.gpu.results gpu_results

Prints Markdown: what was measured on, each aim beside what was measured, and a table of each part.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.record import Row, table

TITLES = {
    "decode": "Decoding",
    "prefill": "Prompts",
    "sweep": "1 to 4,096 sequences",
    "int8": "8 bits",
    "paper": "The paper's throughput table",
    "training": "Training",
    "quality": "Quality",
    "tests": "Tests",
}
"""Of the parts, in the order of the page."""
LEFT_OUT = ("low", "high", "rounds", "seconds")
"""Columns of the files that the page has no room for."""
_BATCH_1 = {"sequences": 1}
_6B_AT_A_SHARE = {"model": "6B", "side": "paper, 29 %"}


class Aim(NamedTuple):
    """What is to be reached.

    Args:
        figure: what is measured.
        aim: the least, or the most where `at_most`.
        part: the part that measures it.
        found: the measured figure from the rows of that part; None if it is not there.
        at_most: whether the aim is an upper bound.
    """

    figure: str
    aim: float
    part: str
    found: Callable[[Sequence[Row]], float | None]
    at_most: bool = False


def value(column: str, **where: Any) -> Callable[[Sequence[Row]], float | None]:
    """The figure of the first row with some values."""

    def found(rows: Sequence[Row]) -> float | None:
        for row in rows:
            if all(row.get(name) == each for name, each in where.items()):
                return row.get(column)
        return None

    return found


def over(
    one: Callable[[Sequence[Row]], float | None], other: Callable[[Sequence[Row]], float | None]
) -> Callable[[Sequence[Row]], float | None]:
    """The ratio of two figures."""

    def found(rows: Sequence[Row]) -> float | None:
        above, below = one(rows), other(rows)
        return above / below if above and below else None

    return found


def worst(
    column: str, of: Callable[..., float], **where: Any
) -> Callable[[Sequence[Row]], float | None]:
    """The least or largest figure of the rows with some values."""

    def found(rows: Sequence[Row]) -> float | None:
        wanted = [r for r in rows if all(r.get(name) == each for name, each in where.items())]
        figures = [row[column] for row in wanted if row.get(column) is not None]
        return of(figures, default=None)

    return found


def _latency(**where: Any) -> Callable[[Sequence[Row]], float | None]:
    return value("latency, ms", **where)


_OURS = _latency(model="DS-MoE-6B", way="paper, 29 %")
_6B_DECODING = _6B_AT_A_SHARE | _BATCH_1
AIMS = (
    Aim(
        "one sequence, 6B at 29 %: bytes of active weights a second over those of a copy",
        0.70,
        "decode",
        value("of copy", **_6B_DECODING),
    ),
    Aim(
        "the same, 8-bit experts over bfloat16",
        1.5,
        "int8",
        value("speed ratio", model="6B", plan="paper, 29 %", side="int8", sequences=1),
    ),
    Aim(
        "the same over the dense twin in the same engine, as a share of the bound",
        0.80,
        "decode",
        over(value("speed ratio", **_6B_DECODING), value("bound", **_6B_DECODING)),
    ),
    Aim(
        "one sequence, 6B at 29 % over Mistral-7B in transformers, eager",
        3.0,
        "paper",
        over(_latency(model="Mistral-7B", way="transformers, eager"), _OURS),
    ),
    Aim(
        "the same, static cache and compiled",
        2.0,
        "paper",
        over(_latency(model="Mistral-7B", way="transformers, static cache, compiled"), _OURS),
    ),
    Aim(
        "a prompt of 2,048 tokens, 6B at 29 % over its dense twin",
        2.0,
        "prefill",
        value("speed ratio", **_6B_AT_A_SHARE, prompts=1, **{"tokens of each": 2048}),
    ),
    Aim(
        "1 to 4,096 sequences: the lowest ratio to the dense twin",
        0.97,
        "sweep",
        worst("speed ratio", min, side="by itself"),
    ),
    Aim(
        "training, 1B, dense gates, compiled blocks: MFU",
        0.45,
        "training",
        value("MFU", side="DS-MoE", blocks="compiled"),
    ),
    Aim(
        "the same over the dense twin",
        0.97,
        "training",
        value("speed ratio", side="DS-MoE", blocks="compiled"),
    ),
    Aim(
        "times that decoding waits for the GPU",
        0,
        "decode",
        worst("host waits", max),
        at_most=True,
    ),
)
"""The aims for one H100 or H200 in bfloat16."""


def main() -> None:
    """Print the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with the JSON files of the parts")
    folder = parser.parse_args().folder
    parts = read(folder)
    if not parts:
        sys.exit(f"benchmarks.gpu.results: there is no result of a part in {folder}")
    print(markdown(parts))


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of each part that there are."""
    files = {part: folder / f"{part}.json" for part in TITLES}
    found = {part: file for part, file in files.items() if file.is_file()}
    return {part: json.loads(file.read_text(encoding="utf-8")) for part, file in found.items()}


def markdown(parts: dict[str, dict[str, Any]]) -> str:
    """The aims and the tables of the parts that there are."""
    blocks = ["## On a GPU", aims(parts)]
    for part, title in TITLES.items():
        if part in parts:
            found = parts[part]
            rows = [{k: v for k, v in row.items() if k not in LEFT_OUT} for row in found["rows"]]
            ended = "" if found["ended"] == "complete" else f" Ended: {found['ended']}."
            blocks += [f"### {title}", f"{machine(found['machine'])}.{ended}", table(rows)]
    return "\n\n".join(block for block in blocks if block)


def aims(parts: dict[str, dict[str, Any]]) -> str:
    """Each aim beside what was measured, or the command that measures it."""
    rows = []
    for aim in AIMS:
        found = aim.found(parts[aim.part]["rows"]) if aim.part in parts else None
        row: Row = {
            "figure": aim.figure,
            "aim": f"at most {aim.aim:g}" if aim.at_most else f"at least {aim.aim:g}",
            "measured": f"not yet: `make gpu PART={aim.part}`",
            "reached": "",
            "on": "",
        }
        if found is not None:
            reached = found <= aim.aim if aim.at_most else found >= aim.aim
            gpu = parts[aim.part]["machine"].get("gpu", "no GPU")
            row |= {"measured": float(found), "reached": "yes" if reached else "no", "on": gpu}
        rows.append(row)
    return table(rows)


def machine(about: dict[str, Any]) -> str:
    """The card, versions, commit and date in a line."""
    words = [about.get("gpu", "no GPU"), f"torch {about['torch']}"]
    words += [f"{name} {about[name]}" for name in ("cuda", "driver", "commit") if about.get(name)]
    return ", ".join([*words, about["date"]])


if __name__ == "__main__":
    main()

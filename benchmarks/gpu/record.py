"""Results of a part of `python -m benchmarks.gpu`, on disk after each measurement."""

import gc
import json
import shutil
import subprocess
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.timing import machine
from lightning_dsmoe.files import write_text

ROOT = Path(__file__).parents[2]

Row = dict[str, Any]


class Measurement(NamedTuple):
    """What is measured, which stands in each row of it, and what gives the rows."""

    what: Row
    measure: Callable[[], list[Row]]


class Record:
    """Rows as `PART.json` and as a table in `PART.md`, both written anew when some are added.

    Args:
        folder: where the two files go.
        part: name of the part.
        about: what is measured on.
        notes: what to know of the columns.
    """

    def __init__(self, folder: Path, part: str, about: dict[str, Any], *, notes: str = "") -> None:
        self.rows: list[Row] = []
        self._folder, self._part, self._about, self._notes = folder, part, about, notes
        self._ended = "not yet: under way, or cut off"
        self._write()

    @property
    def failures(self) -> int:
        """Measurements that gave an error in place of numbers."""
        return sum("error" in row for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep and print rows."""
        for row in rows:
            print(f"{self._part}: {_in_words(row)}", flush=True)
        self.rows += rows
        self._write()

    def end(self, how: str) -> None:
        """Say how the part came to its end."""
        print(f"{self._part}: {how}", flush=True)
        self._ended = how
        self._write()

    def _write(self) -> None:
        results = {
            "part": self._part,
            "machine": self._about,
            "ended": self._ended,
            "rows": self.rows,
        }
        write_text(self._folder / f"{self._part}.json", json.dumps(results, indent=1) + "\n")
        lines = [f"{self._part}: {_in_words(self._about)}", self._notes, table(self.rows)]
        text = "\n\n".join(line for line in (*lines, f"Ended: {self._ended}.") if line)
        write_text(self._folder / f"{self._part}.md", text + "\n")


def carry_out(measurements: Sequence[Measurement], record: Record, *, until: float) -> None:
    """Measure one thing after another, and go on after one that fails.

    Args:
        measurements: what to measure.
        record: where the rows go.
        until: time by `time.monotonic()` after which nothing new is begun.
    """
    for number, (what, measure) in enumerate(measurements):
        if time.monotonic() > until:
            left = "; ".join(_in_words(each.what) for each in measurements[number:])
            record.end(f"time was up, not measured: {left}")
            return
        try:
            rows = measure()
        except Exception as error:  # whatever it is, the rest is still worth measuring
            rows = [{"error": in_one_line(error)}]
        record.add([what | row for row in rows])
        tidy_up()
    failed = f", but {record.failures} rows are errors" if record.failures else ""
    record.end(f"complete{failed}")


def tidy_up() -> None:
    """Give back the memory of what is no longer used, also after an error."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def about(device: torch.device) -> dict[str, Any]:
    """The machine, and the commit that is measured if this is a repository."""
    driver = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = _said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
    return machine(device) | {"cuda": torch.version.cuda, "driver": driver, "commit": commit}


def in_one_line(error: BaseException) -> str:
    """An error, shortened."""
    words = " ".join(str(error).replace("|", "/").split())
    return textwrap.shorten(f"{type(error).__name__}: {words}", 200, placeholder=" ...")


def table(rows: Sequence[Row]) -> str:
    """Markdown with a column for every key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return ""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _in_words(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {_cell(value)}" for name, value in values.items() if value is not None
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "/")


def _said_by(*command: str) -> str | None:
    """The first line that a command says, None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.split("\n")[0].strip() or None) if done.returncode == 0 else None

"""A process that reads thousands of forged files under limits of time and memory."""

import json
import logging
import multiprocessing
import random
import resource
import signal
import traceback
import warnings
from pathlib import Path
from typing import Any

from .readers import READERS, Reader

SECONDS = 2
"""Of processor time for a file; the process ends beyond it."""
BYTES = 500 * 2**20
"""Of address space more than reading whole files takes."""


def stress(reader: str, folder: Path, first: int, count: int) -> dict[str, Any]:
    """Forge and read files in processes of their own; one that ends is followed by another.

    Args:
        reader: name of the reader.
        folder: for its files.
        first: seed of the first file.
        count: number of files.

    Returns:
        Numbers of files "accepted" and "refused", and "faults", a text for each of the others.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_dsmoe", "lightning", "tests.stress.readers"])
    totals: dict[str, Any] = {"accepted": 0, "refused": 0, "faults": []}
    at = first
    while at < first + count:
        (folder / "outcome.json").unlink(missing_ok=True)
        process = context.Process(target=_work, args=(reader, folder, at, first + count))
        process.start()
        process.join()
        outcome = json.loads((folder / "outcome.json").read_text())
        for name in totals:
            totals[name] += outcome[name]
        at = outcome["next"]
        if process.exitcode:
            totals["faults"].append(f"{reader} {at}: ended with {process.exitcode}")
            at += 1
    return totals


def _work(reader: str, folder: Path, first: int, stop: int) -> None:
    logging.disable()
    warnings.simplefilter("ignore")
    (folder / "files").mkdir(exist_ok=True)
    own = READERS[reader](folder / "files")
    for seed in (-1, -2):  # what is imported when it is first needed
        _case(own, seed)
    limit = _address_space() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcome: dict[str, Any] = {"accepted": 0, "refused": 0, "faults": []}
    for seed in range(first, stop):
        _write(folder, {**outcome, "next": seed})
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends the process
        kind, fault = _case(own, seed)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if fault is not None:
            outcome["faults"].append(f"{reader} {seed}: {fault}")
        else:
            outcome[kind] += 1
    _write(folder, {**outcome, "next": stop})


def _case(own: Reader, seed: int) -> tuple[str, str | None]:
    """Whether a file was accepted or refused, and what was wrong with that."""
    expected = own.forge(random.Random(seed))
    try:
        found = own.read()
    except (ValueError, OSError) as error:
        is_line = 0 < len(str(error)) < 3000 and "\n" not in str(error)
        return "refused", None if is_line else f"not one line: {str(error)[:500]!r}"
    except BaseException:
        return "refused", traceback.format_exc()
    same = expected is None or found == expected
    return "accepted", None if same else "changed, and accepted"


def _write(folder: Path, outcome: dict[str, Any]) -> None:
    (folder / "outcome.json").write_text(json.dumps(outcome))


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()

"""The tests that need a GPU, for `python -m benchmarks.gpu`: each file in a process of its own.

One file's crash, or a package that it lacks, then leaves the others' results.
"""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.record import ROOT, Measurement, Row

NOTES = "`pytest -m gpu`, each file in a process of its own."
LINES = 200
OPTIONS = (
    # A machine without pytest-timeout or with another pytest does not know all of the settings, and
    # plug-ins that it has beside may warn, which is an error in the tests.
    "--override-ini=addopts=--import-mode=importlib --strict-markers",
    "--override-ini=minversion=7",
    "-Wignore::pytest.PytestConfigWarning",
    "-pno:benchmark",
    "-pno:cacheprovider",
)


def files_with(marker: str, folder: Path) -> list[Path]:
    """Test files that use a marker."""
    return [
        path
        for path in sorted(folder.rglob("test_*.py"))
        if f"pytest.mark.{marker}" in path.read_text(encoding="utf-8")
    ]


def files_one_by_one(
    folder: Path, output: Path, until: float, *, marker: str = "gpu", root: Path = ROOT
) -> list[Measurement]:
    """Every test file of a folder that has such tests.

    Args:
        folder: the tests.
        output: the end of what pytest says of each file is added here.
        until: time by `time.monotonic()` at which a file under way is cut off.
        marker: of the tests.
        root: where to run.
    """
    output.unlink(missing_ok=True)
    return [
        Measurement(
            {"file": str(path.relative_to(root))}, partial(_run, path, output, until, marker, root)
        )
        for path in files_with(marker, folder)
    ]


def _run(path: Path, output: Path, until: float, marker: str, root: Path) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.xml"), Path(folder, "log.txt")
        words = ["-m", marker, f"--junitxml={report}", "--tb=short", "-ra", *OPTIONS]
        try:
            with log.open("w") as file:
                subprocess.run(
                    [sys.executable, "-m", "pytest", str(path), *words],
                    cwd=root,
                    env=os.environ | {"PYTHONPATH": _with_root(root)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, until - time.monotonic()),
                    check=False,
                )
        except subprocess.TimeoutExpired:
            return [{"error": "cut off, time was up"}]
        finally:
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]
            with output.open("a", encoding="utf-8") as file:
                file.write("\n".join([f"== {path.relative_to(root)}", *last, ""]))
        if not report.exists():
            return [{"error": f"pytest wrote no report: {last[-1] if last else 'nothing said'}"}]
        return results(report)


def results(report: Path) -> list[Row]:
    """Counts and failures of a report of pytest; no row if no test has the marker after all."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {kind: [c for c in cases if c.find(kind) is not None] for kind in ("failure", "error")}
    skipped = [case for case in cases if case.find("skipped") is not None]
    bad = failed["failure"] + failed["error"]
    row: Row = {
        "passed": sum(case not in bad and case not in skipped for case in cases),
        "failed": len(failed["failure"]),
        "errors": len(failed["error"]),
        "skipped": len(skipped),
        "seconds": sum(float(case.get("time", 0)) for case in cases),
    }
    if bad:
        row["error"] = "; ".join(f"{case.get('name')}: {_first_line(case)}" for case in bad)
    return [row] if cases else []


def _first_line(case: ElementTree.Element) -> str:
    found = case.find("failure")
    found = case.find("error") if found is None else found
    return "" if found is None else " ".join((found.get("message") or "").split())[:200]


def _with_root(root: Path) -> str:
    return os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])

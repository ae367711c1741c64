"""How sparse a trained model can run."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_dsmoe.analysis import PlanResult, evaluate_plan, frontier, knee
from lightning_dsmoe.analysis.plans.frontier import frontier_figure, sweep_plans
from lightning_dsmoe.commands.evaluation_setup import open_trained
from lightning_dsmoe.files import atomic_path, read_json, sha256, write_text
from lightning_dsmoe.routing import SelectionPlan

_COLUMNS = ("loss", "share", "share_p50", "share_p95", "tokens_per_second")
"""Names in the files of a sweep, which stay as they are for those who read them."""


def sweep(
    ckpt_path: str,
    output: str = "sweep",
    **options: Any,
) -> None:
    """Measure a trained model under some forty plans, from very sparse to dense.

    Writes sweep.csv, sweep.json, frontier.svg, frontier.png and the plan of the knee, and goes on
    where it was stopped.

    Args:
        ckpt_path: checkpoint of `fit`.
        output: folder of the results.
        options: of the text and the device, see `open_trained`.

    Raises:
        ValueError: if the checkpoint or the text is not fit for it, or the folder holds a sweep of
            something else.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, {output} is a file")
    model, counts, text, _ = open_trained(ckpt_path, **options)
    plans = sweep_plans(model.decoder)
    identity = {
        "checkpoint": sha256(Path(ckpt_path)),
        "text": text.fingerprint(),
        "device": str(text.device),
    }
    results = _earlier(folder / "sweep.json", identity, plans)
    model(text.batches[0][0])  # a device is slow at first
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(
            f"{len(plans)} plans on {text.n_tokens:,} tokens", total=len(plans)
        )
        for name, plan in plans.items():
            if name not in results:
                results[name] = evaluate_plan(model, plan, text, counts)
                _write_json(folder / "sweep.json", identity, plans, results)
            progress.advance(task)
    _write_csv(folder / "sweep.csv", results)
    figure = frontier_figure(results)
    for suffix in ("svg", "png"):
        with atomic_path(folder / f"frontier.{suffix}") as path:
            figure.savefig(path, format=suffix, dpi=150)
    best = list(results)[knee([(r.active_share_mean, r.loss) for r in results.values()])]
    plans[best].save(folder / "knee.json")
    Console().print(_table(results, best))
    print(f"The knee is {best}: {folder / 'knee.json'}")


def _earlier(
    path: Path, identity: dict[str, str], plans: dict[str, SelectionPlan]
) -> dict[str, PlanResult]:
    """Results of an earlier sweep of the same model, text and plans."""
    if not path.exists():
        return {}
    try:
        found = read_json(path)
        rows = found["plans"].items()
        same = found["identity"] == identity and all(
            name in plans and plans[name].to_dict() == row["plan"] for name, row in rows
        )
        results = {name: _result(row["result"]) for name, row in rows}
        is_sweep = all(map(_are_numbers, results.values()))
    except (ValueError, TypeError, KeyError, AttributeError):
        is_sweep = False
    if not is_sweep:
        raise ValueError(f"{path} is not a sweep; choose another output")
    if not same:
        raise ValueError(
            f"{path} is of another model, text, device or version; choose another output"
        )
    return results


def _are_numbers(result: PlanResult) -> bool:
    return all(
        type(value) in (int, float) and math.isfinite(value) for value in _figures(result).values()
    )


def _write_json(
    path: Path,
    identity: dict[str, str],
    plans: dict[str, SelectionPlan],
    results: dict[str, PlanResult],
) -> None:
    rows = {
        name: {"result": _figures(result), "plan": plans[name].to_dict()}
        for name, result in results.items()
    }
    write_text(path, json.dumps({"identity": identity, "plans": rows}, indent=2) + "\n")


def _write_csv(path: Path, results: dict[str, PlanResult]) -> None:
    best = frontier([(r.active_share_mean, r.loss) for r in results.values()])
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["plan", *_figures(results["all"]), "on_frontier"])
    for number, (name, result) in enumerate(results.items()):
        writer.writerow([name, *_figures(result).values(), number in best])
    write_text(path, lines.getvalue())


def _figures(result: PlanResult) -> dict[str, float]:
    """What is told of a plan: all but the losses of single windows."""
    return dict(zip(_COLUMNS, result[:-1], strict=True))


def _result(figures: dict[str, float]) -> PlanResult:
    loss, share, share_p50, share_p95, speed = (figures[name] for name in _COLUMNS)
    return PlanResult(loss, share, share_p50, share_p95, speed, window_losses=())


def _table(results: dict[str, PlanResult], knee_name: str) -> Table:
    dense = results["all"]
    table = Table("plan", "loss", "against all", "active", "p50", "p95", "tokens/s read")
    points = [(r.active_share_mean, r.loss) for r in results.values()]
    names = list(results)
    for number in frontier(points):
        result = results[names[number]]
        table.add_row(
            names[number] + (" (knee)" if names[number] == knee_name else ""),
            f"{result.loss:.4f}",
            f"{result.loss / dense.loss - 1:+.2%}",
            f"{result.active_share_mean:.1%}",
            f"{result.active_share_p50:.1%}",
            f"{result.active_share_p95:.1%}",
            f"{result.tokens_per_second:,.0f}",
        )
    return table

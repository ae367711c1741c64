"""How sparse a trained model can run."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from lightning_dsmoe.analysis import PlanResult, evaluate_plan, frontier, knee, sweep_plans
from lightning_dsmoe.analysis.plans.frontier import frontier_figure
from lightning_dsmoe.commands.console import kept_when_stopped
from lightning_dsmoe.commands.evaluation_setup import open_trained
from lightning_dsmoe.commands.result_table import result_table
from lightning_dsmoe.files import atomic_path, check_place, read_json, sha256, write_text
from lightning_dsmoe.routing import SelectionPlan, routed_layers
from lightning_dsmoe.routing.plan import describe
from lightning_dsmoe.units import percent

Results = dict[str, PlanResult]

_COLUMNS = ("loss", "share", "share_p50", "share_p95", "tokens_per_second")
"""Names in the files, of all that `PlanResult` holds but the losses of single windows."""


def sweep(
    ckpt_path: str,
    output: str = "sweep",
    **options: Any,
) -> None:
    """Measure loss and active share under some forty plans, from very sparse to dense.

    Writes sweep.csv, sweep.json, the frontier of loss against active share (frontier.svg,
    frontier.png) and the plan at its knee (knee.json). A stopped sweep is resumable: start it again
    with the same options.

    Args:
        ckpt_path: checkpoint of `fit`.
        output: folder of the results.
        options: of the text and the device, see `open_trained`.

    Raises:
        ValueError: if the checkpoint or the text is invalid, or the folder holds a sweep of
            something else.
    """
    if not output:
        raise ValueError("output must name a folder, got ''")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, {output} is a file")
    check_place(folder / "sweep.json" if folder.is_dir() else folder)
    model, counts, text, _ = open_trained(ckpt_path, **options)
    plans = sweep_plans(model.decoder)
    identity = {
        "checkpoint": sha256(Path(ckpt_path)),
        "text": text.fingerprint(),
        "device": str(text.device),
    }
    results = _earlier(folder / "sweep.json", identity, plans)
    model(text.batches[0][0])  # warm-up: the first call on a device is slow

    def kept() -> str:
        return (
            f"{len(results)} of {len(plans)} plans are in {folder / 'sweep.json'}, and the same "
            "command goes on from there"
        )

    with kept_when_stopped(kept), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(
            f"{len(plans)} plans on {text.n_tokens:,} tokens", total=len(plans)
        )
        for name, plan in plans.items():
            if name not in results:
                results[name] = evaluate_plan(model, plan, text, counts)
                _write_json(folder / "sweep.json", identity, plans, results)
            progress.advance(task)
    points = [(result.active_share_mean, result.loss) for result in results.values()]
    best, names = frontier(points), list(results)
    _write_csv(folder / "sweep.csv", results, {names[number] for number in best})
    figure = frontier_figure(results)
    for suffix in ("svg", "png"):
        with atomic_path(folder / f"frontier.{suffix}") as path:
            figure.savefig(path, format=suffix, dpi=150)
    turn = names[knee(points)]
    plans[turn].save(folder / "knee.json")
    rows = [(f"{n} (knee)" if n == turn else n, results[n]) for n in (names[i] for i in best)]
    title = "Frontier: no other plan beats these"
    Console().print(result_table(title, rows, results["all"], speed=True))
    words = describe(plans[turn], routed_layers(model.decoder))
    print(f"The knee is {turn} ({words}), in {folder / 'knee.json'}")
    print(f"It runs {percent(results[turn].active_share_mean)} of the hidden parameters.")


def _earlier(path: Path, identity: dict[str, str], plans: dict[str, SelectionPlan]) -> Results:
    """Results of an earlier sweep of the same model, text and plans."""
    if not path.exists():
        return {}
    try:
        data = read_json(path)
        rows = data["plans"].items()
        same = data["identity"] == identity and all(
            name in plans and plans[name].to_dict() == row["plan"] for name, row in rows
        )
        results = {name: _result(row["result"]) for name, row in rows}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is not a sweep; choose another output") from None
    if not same:
        raise ValueError(
            f"{path} is of another model, text, device or version; choose another output"
        )
    return results


def _result(row: dict[str, float]) -> PlanResult:
    loss, share, share_p50, share_p95, speed = values = [row[name] for name in _COLUMNS]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise ValueError(f"results must be finite numbers, got {row}")
    return PlanResult(loss, share, share_p50, share_p95, speed, window_losses=())


def _write_json(
    path: Path, identity: dict[str, str], plans: dict[str, SelectionPlan], results: Results
) -> None:
    rows = {
        name: {"result": dict(zip(_COLUMNS, result, strict=False)), "plan": plans[name].to_dict()}
        for name, result in results.items()
    }
    write_text(path, json.dumps({"identity": identity, "plans": rows}, indent=2) + "\n")


def _write_csv(path: Path, results: Results, on_frontier: set[str]) -> None:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["plan", *_COLUMNS, "on_frontier"])
    for name, result in results.items():
        writer.writerow([name, *result[:-1], name in on_frontier])
    write_text(path, lines.getvalue())

"""What was measured under several plans, as a table and as JSON."""

from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from rich.markup import escape
from rich.table import Table

from lightning_dsmoe.analysis.text_models import TextLoss
from lightning_dsmoe.analysis.text_models.tasks import Metric, TaskResult
from lightning_dsmoe.metrics import ActiveShare
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.units import digits, percent
from lightning_dsmoe.version import VERSION

FORMAT_VERSION = 1


class OnTask(NamedTuple):
    """A task under a plan: its results, those of a group's tasks too, and the active share."""

    results: list[TaskResult]
    share: ActiveShare | None


class OnText(NamedTuple):
    """A text under a plan: the loss on it, and the active share."""

    loss: TextLoss
    share: ActiveShare | None


@dataclass
class Column:
    """What was measured under a plan.

    Args:
        name: heading of the column.
        words: the plan in words.
        plan: the plan.
        tasks: by the name that was asked for.
        text: None without a text.
    """

    name: str
    words: str
    plan: SelectionPlan
    tasks: dict[str, OnTask] = field(default_factory=dict)
    text: OnText | None = None


def evaluation_table(columns: list[Column], text: str | None) -> Table:
    """A table with a column for each plan, the first of which is the one to compare with.

    Args:
        columns: what was measured.
        text: name of the text, if there is one.
    """
    # What is in brackets in a name would be markup.
    table = Table("", *(escape(column.name) for column in columns))
    table.caption = "± standard error; active: share of the hidden parameters, mean over tokens"
    for asked in columns[0].tasks:
        found = [column.tasks[asked] for column in columns]
        for at, result in enumerate(found[0].results):
            n = "" if result.n_samples is None else f" ({result.n_samples:,})"
            for metric in result.metrics:
                values = (each.results[at].metrics[metric] for each in found)
                table.add_row(escape(f"{result.name}{n}, {metric}"), *map(_measured, values))
        table.add_row(escape(f"{asked}, active"), *(_share(each.share) for each in found))
        table.add_section()
    on_text = [column.text for column in columns if column.text is not None]
    if on_text:
        losses = [each.loss for each in on_text]
        changes = [percent(loss.nats / losses[0].nats - 1, sign="+") for loss in losses[1:]]
        nats = (f"{each.nats_per_token:.3f}" for each in losses)
        table.add_row(escape(f"{text}, bits per byte"), *map(_bits, losses))
        table.add_row(escape(f"{text}, nats per token"), *nats)
        if changes:
            table.add_row(escape(f"{text}, loss vs {columns[0].name}"), "", *changes)
        table.add_row(escape(f"{text}, active"), *(_share(each.share) for each in on_text))
    return table


def as_json(columns: list[Column], source: dict[str, Any]) -> dict[str, Any]:
    """The same as plain data.

    Args:
        columns: what was measured.
        source: of what, and how.
    """
    versions = {"lightning_dsmoe": VERSION, "torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):
        versions["lm-eval"] = version("lm-eval")
    return {
        "format_version": FORMAT_VERSION,
        **source,
        "versions": versions,
        "plans": {column.name: _column(column) for column in columns},
    }


def _column(column: Column) -> dict[str, Any]:
    found: dict[str, Any] = {"plan": column.plan.to_dict(), "in_words": column.words}
    for asked, (results, share) in column.tasks.items():
        by_name = {
            each.name: {
                "samples": each.n_samples,
                "metrics": {name: metric._asdict() for name, metric in each.metrics.items()},
            }
            for each in results
        }
        task = {"results": by_name, "active_share": _share_as_json(share)}
        found.setdefault("tasks", {})[asked] = task
    if column.text is not None:
        loss, share = column.text
        found["text"] = {
            **loss._asdict(),
            "nats_per_token": loss.nats_per_token,
            "bits_per_byte": loss.bits_per_byte,
            "active_share": _share_as_json(share),
        }
    return found


def _measured(metric: Metric) -> str:
    value = "not finite" if metric.value is None else digits(metric.value)
    return value if metric.stderr is None else f"{value} ± {_error(metric.stderr)}"


def _bits(loss: TextLoss) -> str:
    text = f"{loss.bits_per_byte:.3f}"
    if loss.stderr is None:
        return text
    return f"{text} ± {_error(loss.stderr / loss.nats * loss.bits_per_byte)}"


def _error(stderr: float) -> str:
    return digits(float(f"{stderr:.2g}"))


def _share(share: ActiveShare | None) -> str:
    return "unknown" if share is None else percent(share.mean.item())


def _share_as_json(share: ActiveShare | None) -> dict[str, float] | None:
    return None if share is None else {n: x.item() for n, x in share._asdict().items()}

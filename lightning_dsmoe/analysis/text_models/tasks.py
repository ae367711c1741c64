"""Tasks of lm-evaluation-harness on a text model under a plan."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from lightning_dsmoe.analysis.text_models.harness import NEEDS_HARNESS, harness_model
from lightning_dsmoe.analysis.text_models.scorer import Scorer

_RESAMPLES = 1000  # of a bootstrap, for metrics whose standard error has no formula


class Metric(NamedTuple):
    """A metric of a task.

    Args:
        value: its value, None if it is not a finite number.
        stderr: its standard error over the samples; None if there is none.
    """

    value: float | None
    stderr: float | None


class TaskResult(NamedTuple):
    """A task, or one of those in a group.

    Args:
        name: its name.
        n_samples: the documents it was measured on; None for a group.
        metrics: by name.
    """

    name: str
    n_samples: int | None
    metrics: dict[str, Metric]


class Tasks:
    """The tasks that lm-evaluation-harness knows, and those in a folder.

    Args:
        folder: task files of one's own (`*.yaml`), see lm-evaluation-harness; None for none.

    Raises:
        ImportError: if lm-evaluation-harness is not installed.
        ValueError: if there is no such folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError(NEEDS_HARNESS) from error
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"tasks_dir must be a folder of task files, got {folder!r}")
        with _quiet():
            self._manager: Any = TaskManager(include_path=folder)

    def check(self, names: Sequence[str]) -> None:
        """Raise a ValueError that lists the names of no task."""
        if unknown := [name for name in names if name not in self._manager.all_tasks]:
            raise ValueError(
                f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` lists "
                "them"
            )

    def run(
        self, name: str, scorer: Scorer, *, num_fewshot: int | None = None, limit: int | None = None
    ) -> list[TaskResult]:
        """Measure a model on a task, or on a group of tasks.

        Args:
            name: the task.
            scorer: the model and the plan.
            num_fewshot: examples in the context; None takes the task's own number.
            limit: most documents; None takes all.

        Returns:
            The task, or the group and its tasks.
        """
        import lm_eval

        with _quiet():
            found = lm_eval.simple_evaluate(
                harness_model(scorer),
                tasks=[name],
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=self._manager,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
            )
        counts = found["n-samples"]
        return [
            TaskResult(
                task, counts[task]["effective"] if task in counts else None, _metrics(values)
            )
            for task, values in found["results"].items()
        ]


def _metrics(values: dict[str, Any]) -> dict[str, Metric]:
    """The metrics in a result, where `acc,none` is one and `acc_stderr,none` its error."""
    found = {}
    for key, value in values.items():
        name, _, chosen = key.partition(",")
        if chosen and not name.endswith("_stderr"):
            shown = name if chosen == "none" else f"{name} ({chosen})"
            stderr = values.get(f"{name}_stderr,{chosen}")
            found[shown] = Metric(_finite(value), _finite(stderr))
    return found


def _finite(value: object) -> float | None:
    # Real: NumPy's numbers, too.
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's advice to the authors of tasks."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

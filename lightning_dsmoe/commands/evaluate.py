"""A model on tasks and text, all experts and plans side by side."""

import json
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from lightning_dsmoe.analysis.text_models import Scorer, text_loss
from lightning_dsmoe.analysis.text_models.tasks import Tasks
from lightning_dsmoe.commands.evaluation_table import (
    Column,
    OnTask,
    OnText,
    as_json,
    evaluation_table,
)
from lightning_dsmoe.commands.text_model_setup import Opened, open_text_model
from lightning_dsmoe.files import check_file, write_text
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.routing.plan import describe


def evaluate(
    ckpt_path: str | None = None,
    artifact: str | None = None,
    from_: str | None = None,
    plans: str | list[str] | None = None,
    tasks: str | list[str] | None = None,
    tasks_dir: str | None = None,
    text: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    output: str | None = None,
    batch_size: int | None = None,
    prefix_token: int | None = None,
    context: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Measure a model on tasks of lm-evaluation-harness or on a text, also under plans.

    Each plan is a column of one table, beside all experts: the metrics with their standard errors,
    and the active share of the very tokens that the model read for them.

    Args:
        ckpt_path: checkpoint of `fit`.
        artifact: directory of a sparse model, instead of a checkpoint; its own plan has a column.
        from_: directory of a model of transformers, upcycled, exported or any other.
        plans: JSON files of selection plans, with commas between them.
        tasks: names of tasks, such as arc_easy,hellaswag (needs the `eval` extra).
        tasks_dir: folder with task files of your own, which `tasks` may name too.
        text: file of a text in UTF-8, for bits per byte and nats per token.
        num_fewshot: examples in the context of a task; by default the task's own number.
        limit: most documents of each task; of a text, most characters.
        output: JSON file of the results.
        batch_size: sequences in a batch; by default what fits into memory.
        prefix_token: the token before a text or an empty context; by default the tokenizer's
            beginning of a text, else its end, else a line break.
        context: most tokens that the model reads at once; by default its context length, of a text
            no more than 2,048.
        device: where to run, such as cpu or cuda:1; by default a CUDA GPU if there is one.
        trust_remote_code: run Python files in the directory of a model of transformers; only for
            authors that you trust.

    Raises:
        ValueError: if not exactly one model is given, there is neither a task nor a text, or a
            file, a plan, a task or a number is invalid.
        ImportError: if a package is missing.
    """
    names = _several(tasks)
    if not names and text is None:
        raise ValueError("evaluate needs --tasks or --text")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if output is not None:
        check_file(output, ckpt_path, text, *_several(plans))
    harness = Tasks(tasks_dir) if names else None
    if harness is not None:
        harness.check(names)
    content = None if text is None else _content(text)[:limit]
    opened = open_text_model(
        ckpt_path=ckpt_path,
        artifact=artifact,
        directory=from_,
        prefix_token=prefix_token,
        context=context,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    columns = [
        Column(name, describe(plan, opened.layers), plan)
        for name, plan in _with_files(opened, _several(plans)).items()
    ]
    with Console(stderr=True).status("reading") as status:

        def scorer(column: Column, what: str) -> Scorer:
            n_read = count(1)  # batches

            def show(n_sequences: int) -> None:
                status.update(escape(f"{what}, {column.name}: batch {next(n_read):,}"))

            return Scorer(opened.model, column.plan, batch_size=batch_size, on_progress=show)

        for column in columns:
            if harness is not None:
                for name in names:
                    reads = scorer(column, name)
                    results = harness.run(name, reads, num_fewshot=num_fewshot, limit=limit)
                    column.tasks[name] = OnTask(results, reads.active_share)
            if content is not None:
                reads = scorer(column, Path(str(text)).name)
                column.text = OnText(text_loss(reads, content, context=context), reads.active_share)
    Console().print(evaluation_table(columns, None if text is None else Path(text).name))
    for column in columns:
        if opened.layers:
            print(f"{column.name}: {column.words}.")
    if output is not None:
        source: dict[str, Any] = {
            "model": ckpt_path or artifact or from_,
            "text": text,
            "num_fewshot": num_fewshot,
            "limit": limit,
            "prefix_token": opened.model.prefix_token,
            "context": context,
        }
        write_text(Path(output), json.dumps(as_json(columns, source), indent=2) + "\n")
        print(f"The results are in {Path(output)}")


def _content(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"there is no text {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from None


def _several(given: str | list[str] | None) -> list[str]:
    """Words with commas between them, or a list of them."""
    words = given if isinstance(given, list) else (given or "").split(",")
    return [word.strip() for word in words if word.strip()]


def _with_files(opened: Opened, files: list[str]) -> dict[str, SelectionPlan]:
    """The plans to run, by the headings of their columns.

    Raises:
        ValueError: if files are not plans for the model, all of them in one message.
    """
    found, problems = dict(opened.plans), []
    for file in files:
        try:
            plan = SelectionPlan.load(file)
            plan.selections(opened.layers)
            if not opened.layers:
                raise ValueError("the model has no routed layers that this library knows")
        except (ValueError, OSError) as error:
            problems.append(f"{file} is not a plan for this model: {error}")
            continue
        stem = Path(file).stem
        found[file if stem in found else stem] = plan
    if problems:
        raise ValueError("; ".join(problems))
    return found

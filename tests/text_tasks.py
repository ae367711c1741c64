"""Small task files of lm-evaluation-harness, and where its data may be kept."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

NAMES = ["choices", "rolling", "continued"]


@contextmanager
def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Nothing is downloaded, nothing written outside a folder, and only own tasks are searched."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness and its packages
        import datasets
        from lm_eval import tasks

        own_only = partial(tasks.TaskManager, include_defaults=False)  # others take ten seconds
        monkeypatch.setattr(tasks, "TaskManager", own_only)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


def write_tasks(folder: Path) -> Path:
    """Three small tasks, one of each kind of request, on a file of JSON lines, and a group."""
    folder.mkdir()
    rows = [
        {
            "q": f"{i} and {j}?",
            "choices": [str(i + j), str(i * j + 11), "many"],
            "text": f"{i}+{j}" * 9,
        }
        for i in range(4)
        for j in range(3)
    ]
    (folder / "sums.json").write_text("\n".join(map(json.dumps, rows)))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.json")}},
        "test_split": "test",
    }
    kinds: dict[str, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "continued": {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["a", "\n"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, options in kinds.items():
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **options}))
    again = {"task": "sums_again", **data, **kinds["choices"], "doc_to_target": 1}
    metric = {"metric": "acc", "weight_by_size": False}
    group = {"group": "all_of_them", "task": ["choices", again], "aggregate_metric_list": [metric]}
    (folder / "group.yaml").write_text(json.dumps(group))
    return folder

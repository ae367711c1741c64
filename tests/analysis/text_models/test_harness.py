"""Tasks of lm-evaluation-harness, with its own adapter for transformers as the judge."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe import SelectionPlan, TopK, run_plan
from lightning_dsmoe.analysis.text_models import DecoderText, Scorer, harness_model
from lightning_dsmoe.analysis.text_models.tasks import Tasks
from lightning_dsmoe.commands.evaluate import evaluate
from tests.text_models import CONTEXT, llama, small_decoder
from tests.text_tasks import NAMES, offline, write_tasks

pytest.importorskip("lm_eval", reason="needs the eval extra")
pytestmark = pytest.mark.slow  # its imports take ten seconds

PLAN = SelectionPlan(experts=TopK(2))


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with offline(monkeypatch, tmp_path):
        yield


@pytest.fixture
def tasks_dir(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def answers(model: Any, folder: Path) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """What a model answers to each document of each task, and the results."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=NAMES, task_manager=manager, bootstrap_iters=10)
    samples = {name: [each["resps"] for each in found["samples"][name]] for name in NAMES}
    return samples, found["results"]


@pytest.mark.parametrize("beginning", [False, True])
def test_the_harness_gives_the_same_with_its_own_adapter(beginning: bool, tasks_dir: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model = llama(beginning=beginning)
    ours, results = answers(harness_model(Scorer(model, PLAN)), tasks_dir)
    with run_plan(model.model, PLAN):
        judge = HFLM(pretrained=model.model, tokenizer=model.tokenizer, max_length=CONTEXT)
        theirs, expected = answers(judge, tasks_dir)
    assert ours["continued"] == theirs["continued"]
    for mine, judged in zip(ours["choices"], theirs["choices"], strict=True):
        for [(logprob, is_greedy)], [(logprob_of_judge, is_greedy_too)] in zip(
            mine, judged, strict=True
        ):
            assert logprob == pytest.approx(logprob_of_judge, rel=1e-5)
            assert is_greedy == is_greedy_too
    assert results["choices"] == expected["choices"]
    if not beginning:  # which the judge scores as if it were text
        assert results["rolling"]["bits_per_byte,none"] == pytest.approx(
            expected["rolling"]["bits_per_byte,none"], rel=1e-5
        )


def test_a_decoder_answers_as_its_logits_say(decoder_text: DecoderText, tasks_dir: Path) -> None:
    scorer = Scorer(decoder_text, PLAN, batch_size=4)
    found, results = answers(harness_model(scorer), tasks_dir)
    right = 0
    for number, [[first], [second], [third]] in enumerate(found["choices"]):
        i, j = divmod(number, 3)
        pairs = {"sum": (first, str(i + j)), "1": (second, str(i * j + 11)), "2": (third, "many")}
        for (logprob, _), choice in pairs.values():
            tokens = decoder_text.encode(f"{i} and {j}? {choice}")
            [score] = Scorer(decoder_text, PLAN).scores([window(tokens, len(choice) + 1)])
            assert logprob == pytest.approx(score.logprob, rel=1e-5)
        right += first[0] >= max(second[0], third[0])
    assert results["choices"]["acc,none"] == pytest.approx(right / 12)
    assert 0.3 < float(scorer.active_share.mean) < 1
    assert math.isfinite(results["rolling"]["bits_per_byte,none"])


def window(tokens: list[int], n_targets: int) -> Any:
    from lightning_dsmoe.analysis.text_models import Window

    return Window(tokens[:-1], tokens[-n_targets:])


def test_the_command_measures_tasks_under_plans(
    tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_decoder().model
    model.plan = PLAN
    model.save(tmp_path / "model")
    output = tmp_path / "results.json"
    evaluate(
        artifact=str(tmp_path / "model"),
        tasks="choices,rolling",
        tasks_dir=str(tasks_dir),
        limit=5,
        output=str(output),
        device="cpu",
    )
    shown = capsys.readouterr().out
    found = json.loads(output.read_text())["plans"]
    assert list(found) == ["all experts", "its plan"]
    for column, plan in zip(found.values(), (SelectionPlan(), PLAN), strict=True):
        scorer = Scorer(DecoderText(model), plan)
        (expected,) = Tasks(str(tasks_dir)).run("choices", scorer, limit=5)
        task = column["tasks"]["choices"]
        result = task["results"]["choices"]
        assert result["samples"] == expected.n_samples == 5
        accuracy = expected.metrics["acc"]
        assert result["metrics"]["acc"]["value"] == pytest.approx(accuracy.value)
        assert result["metrics"]["acc"]["stderr"] == pytest.approx(accuracy.stderr)
        assert task["active_share"]["mean"] == pytest.approx(scorer.active_share.mean)
    assert "choices" in shown
    assert "bits_per_byte" in shown


def test_unknown_tasks(tasks_dir: Path) -> None:
    tasks = Tasks(str(tasks_dir))
    tasks.check(NAMES)
    with pytest.raises(ValueError, match=r"has no task sum_of, choi\*; `lm_eval ls tasks`"):
        tasks.check(["sum_of", *NAMES, "choi*"])  # which the harness does not run
    with pytest.raises(ValueError, match="tasks_dir must be a folder of task files, got "):
        Tasks(str(tasks_dir / "none"))

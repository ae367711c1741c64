"""Tasks by their names, and what of their results is kept."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightning_dsmoe import SelectionPlan, TopK
from lightning_dsmoe.analysis.text_models import DecoderText, Scorer, harness_model
from lightning_dsmoe.analysis.text_models.tasks import Metric, Tasks, _metrics
from tests.text_tasks import offline, write_tasks

PLAN = SelectionPlan(experts=TopK(2))


def test_metrics_and_their_errors() -> None:
    values = {
        "alias": "sums",
        "acc,none": np.float32(0.25),
        "acc_stderr,none": 0.1,
        "exact_match,strict": 1,
        "exact_match_stderr,strict": "N/A",
        "perplexity,none": math.inf,
    }
    assert _metrics(values) == {
        "acc": Metric(0.25, 0.1),
        "exact_match (strict)": Metric(1.0, None),
        "perplexity": Metric(None, None),
    }


class TestWithTheHarness:
    pytestmark = pytest.mark.slow  # its imports take ten seconds

    @pytest.fixture(autouse=True)
    def without_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        pytest.importorskip("lm_eval", reason="needs the eval extra")
        with offline(monkeypatch, tmp_path):
            yield

    @pytest.fixture
    def tasks(self, tmp_path: Path) -> Tasks:
        return Tasks(str(write_tasks(tmp_path / "tasks")))

    def test_results_are_those_of_the_harness(
        self, tasks: Tasks, decoder_text: DecoderText
    ) -> None:
        import lm_eval

        scorer = Scorer(decoder_text, PLAN)
        [choices] = tasks.run("choices", scorer, limit=7)
        expected = lm_eval.simple_evaluate(
            harness_model(Scorer(decoder_text, PLAN)),
            tasks=["choices"],
            task_manager=tasks._manager,
            limit=7,
        )["results"]["choices"]
        assert (choices.name, choices.n_samples) == ("choices", 7)
        assert choices.metrics == {
            name: Metric(expected[f"{name},none"], expected[f"{name}_stderr,none"])
            for name in ("acc", "acc_norm")
        }
        assert 0.3 < float(scorer.active_share.mean) < 1

    def test_a_group_and_its_tasks(self, tasks: Tasks, decoder_text: DecoderText) -> None:
        again = "all_of_them::sums_again"
        found = {each.name: each for each in tasks.run("all_of_them", Scorer(decoder_text))}
        assert found.keys() == {"all_of_them", "choices", again}
        assert found["all_of_them"].n_samples is None
        accuracies = [found[name].metrics["acc"].value for name in ("choices", again)]
        assert found["all_of_them"].metrics["acc"].value == pytest.approx(sum(accuracies) / 2)

    def test_examples_in_the_context(self, tasks: Tasks, decoder_text: DecoderText) -> None:
        none, two = (
            tasks.run("rolling", Scorer(decoder_text), num_fewshot=n)[0].metrics for n in (0, 2)
        )
        assert none["bits_per_byte"].value > 0
        assert two.keys() == none.keys()

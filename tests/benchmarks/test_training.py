import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import training


@pytest.fixture
def tiny() -> Any:
    return training.Size("tiny", 16, 2, 4, 4, 2, 8, 2, 8)


def test_ratio_is_above_one_where_the_candidate_is_faster() -> None:
    comparison = training.compare([1.0, 2.0, 4.0], [2.0, 4.0, 4.0])
    assert comparison == (2.0, 4.0, 2.0, (1.0, 2.0))


def test_both_sides_take_the_same_number_of_steps() -> None:
    calls = []
    training.interleave(
        lambda: calls.append("a"), lambda: calls.append("b"), rounds=4, calls=3, warm_up=2
    )
    assert calls.count("a") == calls.count("b") == 2 + 4 * 3


def test_twins_have_the_same_weights_but_for_the_routers(tiny: Any) -> None:
    def shapes(model: torch.nn.Module) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if "router" not in name)

    assert shapes(training.ds_moe(tiny)) == shapes(training.dense_twin(tiny))


def test_steps_are_timed_and_train(tiny: Any) -> None:
    comparison = training.compare_with_twin(tiny, rounds=2, calls=1, compiled=False)
    assert min(comparison.candidate, comparison.reference, comparison.ratio) > 0


def test_kept_bytes_grow_with_the_batch_and_leave_parameters_out(tiny: Any) -> None:
    model = training.ds_moe(tiny)
    once = training.kept_bytes(model, tiny)
    twice = training.kept_bytes(model, tiny._replace(batch_size=2 * tiny.batch_size))
    assert 1.9 < twice / once <= 2


def test_product_takes_turns_with_the_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["training.py"])
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    comparison = training.compare_product(
        rounds=2,
        steps=2,
        skip=1,
        overrides=(
            f"--data.init_args.files={text}",
            f"--data.init_args.cache_dir={tmp_path}",
            "--trainer.log_every_n_steps=2",
            "--trainer.limit_val_batches=1",
        ),
    )
    assert min(comparison.candidate, comparison.reference) > 0
    results = {
        "machine": training.machine(),
        "speed": {"quickstart / plain loop": comparison._asdict()},
        "memory": {},
    }
    assert json.loads(json.dumps(results))["speed"]
    assert "quickstart / plain loop" in training.table(results)

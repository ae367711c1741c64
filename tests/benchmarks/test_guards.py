"""What guards cost is measured with all of them and with none."""

import sys
from pathlib import Path

import pytest

from benchmarks.speed import guards

pytestmark = pytest.mark.slow


def test_blocks_with_and_without_guards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["guards.py"])
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    turns = guards.measure(
        rounds=2,
        steps=2,
        overrides=(
            f"--data.init_args.files={text}",
            f"--data.init_args.cache_dir={tmp_path}",
            "--trainer.log_every_n_steps=2",
        ),
    )
    assert len(turns.guarded) == len(turns.bare) == 2
    assert "all together" in guards.table(turns)

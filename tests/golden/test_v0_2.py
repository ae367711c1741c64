"""Files in the formats that came after version 0.1 are read, and mean the same."""

from pathlib import Path

import pytest

from lightning_dsmoe import AllExperts, SelectionPlan, Threshold, TopK
from lightning_dsmoe.data import TextDataModule

from ..training.test_sharded_checkpoints import losses

FOLDER = Path(__file__).parent / "files_v0_2"
PLAN = SelectionPlan(
    experts=TopK(2),
    attention=Threshold(0.5, renormalize=True),
    layers={"blocks.0.feed_forward": AllExperts(), "blocks.1.attention": TopK(1)},
)
TEXT = "".join(f"def f{i}(x):\n    return x * {i} # é€\n" for i in range(20))
LOSSES = [2.3552539, 2.3439660]
"""Of the third and fourth step of the run that wrote the folder after two."""


def test_plan_loads() -> None:
    assert SelectionPlan.load(FOLDER / "plan.json") == PLAN


def test_plan_of_version_0_1_is_written_in_the_present_format(tmp_path: Path) -> None:
    old = SelectionPlan.load(FOLDER.parent / "files_v0_1" / "sparse" / "plan.json")
    old.save(tmp_path / "plan.json")
    assert SelectionPlan.load(tmp_path / "plan.json") == old
    assert '"format_version": 2' in (tmp_path / "plan.json").read_text()


def test_tokens_load() -> None:
    data = TextDataModule(
        FOLDER / "tokens", tokenizer="char", val_fraction=0.2, test_fraction=0.1, context=8
    )
    data.setup()
    spans = [data._tokens().span(split) for split in ("train", "val", "test")]
    texts = [data.tokenizer.decode(span.read(0, len(span)).tolist()) for span in spans]
    assert "".join(texts) == TEXT
    assert [len(files) for files in data._tokens().shards.values()] == [2, 1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
@pytest.mark.filterwarnings("ignore:the checkpoint holds the random states:UserWarning")
def test_folder_of_two_sharded_processes_is_resumed(tmp_path: Path) -> None:
    found = losses(tmp_path, 1, "adamw", FOLDER / "sharded.ckpt")
    assert found == pytest.approx(LOSSES, rel=1e-5)

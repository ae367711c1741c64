"""What completes a folder of shards, in one process."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save

from lightning_dsmoe.files import hidden_beside
from lightning_dsmoe.serialization.sharded_folder import read_folder
from lightning_dsmoe.training.sharded_checkpoints import _finish

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def shards(place: Path, value: float) -> Path:
    """The shards of a checkpoint that is not complete."""
    hidden = hidden_beside(place)
    save({"state_dict": {"a": torch.full((2,), value)}}, checkpoint_id=hidden)
    return hidden


def test_shards_that_are_not_here_replace_no_checkpoint(tmp_path: Path) -> None:
    """As where each of several machines writes to a disk of its own."""
    place = tmp_path / "last.ckpt"
    _finish({"global_step": 1}, shards(place, 1.0), place)
    hidden = shards(place, 2.0)
    next(hidden.glob("*.distcp")).unlink()
    with pytest.raises(OSError, match=r"no checkpoint was written: .*is missing.* have to see"):
        _finish({"global_step": 2}, hidden, place)
    assert read_folder(place)["global_step"] == 1
    _finish({"global_step": 3}, shards(place, 3.0), place)
    assert read_folder(place)["state_dict"]["a"].tolist() == [3.0, 3.0]

"""A trained model for these tests, and what tests of inference have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from lightning_dsmoe.training.language_model import DSMoELanguageModel

from ..inference.conftest import ATTENTION, FEED_FORWARD
from ..inference.conftest import artifact as artifact
from ..inference.conftest import decoder as decoder
from ..inference.conftest import float_artifact as float_artifact
from ..inference.conftest import grouping_always_pays as grouping_always_pays
from ..inference.conftest import make_decoder as make_decoder
from ..inference.conftest import one_decoder as one_decoder
from ..inference.conftest import originals as originals
from ..inference.conftest import plan as plan
from ..inference.conftest import tokens as tokens


class Trained:
    """A model after two steps, and the trainer that writes its checkpoint."""

    def __init__(self, path: Path, **options: Any) -> None:
        torch.manual_seed(5)
        self.path = path
        self.model = DSMoELanguageModel(
            29, 16, 2, **{"attention": ATTENTION, "feed_forward": FEED_FORWARD, **options}
        )
        self.trainer = Trainer(
            accelerator="cpu",
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        windows = [{"input_ids": t[:-1], "labels": t[1:]} for t in torch.randint(29, (4, 9))]
        loader = DataLoader(windows, batch_size=2)  # type: ignore[arg-type]
        self.trainer.fit(self.model, loader, loader)

    def save(self) -> "Trained":
        self.trainer.save_checkpoint(self.path)
        return self


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained") / "model.ckpt").save()


Forge = Callable[..., Path]


@pytest.fixture
def forge(trained: Trained, tmp_path: Path) -> Forge:
    def write(**changes: object) -> Path:
        checkpoint = {**torch.load(trained.path, weights_only=True), **changes}
        kept = {name: value for name, value in checkpoint.items() if value is not ...}
        torch.save(kept, tmp_path / "forged.ckpt")
        return tmp_path / "forged.ckpt"

    return write

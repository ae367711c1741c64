from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.routing import LinearRouter
from lightning_dsmoe.training.language_model import DSMoELanguageModel

from ..remote_logger import Remote

V = 11
T = 6

Loader = DataLoader[dict[str, Tensor]]


@pytest.fixture
def make_remote() -> type[Remote]:
    return Remote


@pytest.fixture
def make_model() -> Callable[..., DSMoELanguageModel]:
    def make(**options: Any) -> DSMoELanguageModel:
        torch.manual_seed(3)
        router = partial(LinearRouter, init_std=1.0)
        attention = partial(
            MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4, router=router
        )
        feed_forward = partial(MixtureOfExperts, n_experts=4, d_expert=3, router=router)
        return DSMoELanguageModel(
            V,
            8,
            2,
            **{"attention": attention, "feed_forward": feed_forward, **options},
        )

    return make


@pytest.fixture
def model(make_model: Callable[..., DSMoELanguageModel]) -> DSMoELanguageModel:
    return make_model()


@pytest.fixture
def make_loader() -> Callable[..., Loader]:
    def make(n_batches: int, *, batch_size: int = 3, seed: int = 0) -> Loader:
        """Batches of which the last is smaller and ends in padding."""
        generator = torch.Generator().manual_seed(seed)
        windows = torch.randint(V, (n_batches * batch_size - 1, T + 1), generator=generator)
        items = [{"input_ids": w[:-1], "labels": w[1:].clone()} for w in windows]
        items[-1]["labels"][2:] = -100
        return DataLoader(items, batch_size=batch_size)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**options: Any) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "logger": CSVLogger(tmp_path, name="logs", flush_logs_every_n_steps=1),
            "log_every_n_steps": 1,
            "max_epochs": -1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return Trainer(**{**defaults, **options})

    return make

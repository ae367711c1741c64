from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.experts import GLUExperts, MixtureOfExperts, MLPExperts
from lightning_dsmoe.routing import LinearRouter
from lightning_dsmoe.training.language_model import DSMoELanguageModel

MakeModel = Callable[..., DSMoELanguageModel]
Batch = dict[str, Tensor]

T = 16
ROUTER = partial(LinearRouter, init_std=0.3)
ATTENTION = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8, router=ROUTER)
FEED_FORWARD = partial(
    MixtureOfExperts,
    n_experts=4,
    d_expert=24,
    router=ROUTER,
    experts=partial(GLUExperts, activation="silu"),
)


def rotary_glu(**options: Any) -> DSMoELanguageModel:
    torch.manual_seed(3)
    sizes = {"vocab_size": 97, "d_model": 32, "n_layers": 2}
    parts = {"attention": ATTENTION, "feed_forward": FEED_FORWARD}
    model = DSMoELanguageModel(**{**sizes, **parts, **options})
    model.configure_model()
    return model


def learned_positions_mlp(**options: Any) -> DSMoELanguageModel:
    torch.manual_seed(3)
    sizes = {"vocab_size": 101, "d_model": 48, "n_layers": 3}
    parts = {
        "attention": partial(
            ATTENTION, n_experts=3, n_heads=2, rope_theta=None, qk_norm=True, bias=True
        ),
        "feed_forward": partial(
            FEED_FORWARD,
            n_experts=5,
            d_expert=20,
            experts=partial(MLPExperts, bias=True),
            d_shared=12,
        ),
        "max_positions": T,
        "tie_embeddings": False,
        "dropout": 0.1,
    }
    model = DSMoELanguageModel(**{**sizes, **parts, **options})
    model.configure_model()
    return model


MODELS: dict[str, MakeModel] = {
    "rotary": rotary_glu,
    "learned": learned_positions_mlp,
}


@pytest.fixture(params=MODELS)
def make_model(request: pytest.FixtureRequest) -> MakeModel:
    return MODELS[request.param]


@pytest.fixture
def make_one_model() -> MakeModel:
    return rotary_glu


@pytest.fixture
def make_loader() -> Callable[..., DataLoader[Batch]]:
    def make(windows: int = 12, *, batch_size: int = 3, ignored: int = 0) -> DataLoader[Batch]:
        """Windows of a sequence that can be learned; the last ends in ignored labels."""
        i = torch.arange(windows * T + 1)
        tokens = (7 * i**2 + 3 * i + 11) % 97
        items = [
            {"input_ids": tokens[t : t + T], "labels": tokens[t + 1 : t + T + 1].clone()}
            for t in range(0, windows * T, T)
        ]
        items[-1]["labels"][T - ignored :] = -100
        return DataLoader(items, batch_size=batch_size)  # type: ignore[arg-type]

    return make


@pytest.fixture
def batch(make_loader: Callable[..., DataLoader[Batch]]) -> Batch:
    """Three windows, the last with five ignored labels."""
    return next(iter(make_loader(3, ignored=5)))


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


class Outputs(Callback):
    """Keeps what every training step returned, and the learning rate that it ran with."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: object
    ) -> None:
        self.outputs.append(outputs)


@pytest.fixture
def outputs() -> Outputs:
    return Outputs()

"""A model that is not ours: an encoder that classifies, with a step of its own.

Shapes: B sequences, T positions, D width, C classes.
"""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_dsmoe import MixtureOfExperts, OutputOnly, RoutingLoss, record_routings

V, T, C = 11, 6, 3


class Encoder(nn.Module):
    """Two blocks around mixtures; what it returns knows nothing of routings."""

    def __init__(self, d_model: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, d_model)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(d_model), OutputOnly(MixtureOfExperts(d_model, 4, 5)))
            for _ in range(2)
        )
        for block in self.blocks:
            nn.init.normal_(block[1].layer.router.weight, std=2.0)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = x_BTD + block(x_BTD)
        return x_BTD


class Classifier(LightningModule):
    """Adds what the callbacks need to a classifier: the lines that are marked."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(8, C)
        self.accuracy = MulticlassAccuracy(C, average="micro")
        self.routing_loss = RoutingLoss(expert_mi=0.2)  # 1

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.head(self.encoder(tokens_BT).mean(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens_BT, labels_B = batch
        with record_routings(self) as record:  # 2
            loss = F.cross_entropy(self(tokens_BT), labels_B)
        self.log("train/loss", loss)
        return loss + self.routing_loss(record)  # 3

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        tokens_BT, labels_B = batch
        logits_BC = self(tokens_BT)
        self.accuracy(logits_BC, labels_B)
        loss = F.cross_entropy(logits_BC, labels_B)
        self.log(f"{split}/loss", loss, sync_dist=True, batch_size=len(labels_B))
        self.log(f"{split}/accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Tokens, and which of three parts of the alphabet their first one is of."""

    def __init__(self, n: int, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens_BT = torch.randint(V, (n, T), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens_BT[index], self.tokens_BT[index, 0] % C


def loader(n: int, batch_size: int = 4, *, seed: int = 0) -> DataLoader[Any]:
    """Batches in order, of which the last may be smaller."""
    return DataLoader(Sequences(n, seed=seed), batch_size=batch_size)


def classifier() -> Classifier:
    torch.manual_seed(3)
    return Classifier()

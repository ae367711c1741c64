"""A vision transformer of mixtures on handwritten digits: trained densely, run sparsely, in 8 bits.

    python examples/vision.py

The transformer and the LightningModule are those of any user. Three lines of the module are for the
library: a `RoutingLoss`, `record_routings` around the training step, and the sum of both losses;
callbacks do the rest. The digits are scikit-learn's: 1,797 images of 8 x 8 pixels.

Shapes: B images, H rows and W columns of pixels, T patches, D width.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dsmoe import (
    FeedForward,
    GroupedQueryAttention,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    RoutingLoss,
    SelectionPlan,
    TopK,
    load_sparse,
    record_routings,
)
from lightning_dsmoe.callbacks import (
    ExpertUtilizationMonitor,
    MIWeightAnnealing,
    SparseCompile,
    SparseEvaluation,
    SparseFinishing,
)

WIDTH, LAYERS, PATCH = 48, 2, 2
EXPERTS, D_EXPERT = 16, 12
ATTENTION_EXPERTS, D_HEAD = 4, 12
STEPS, BATCH_SIZE, LEARNING_RATE = 600, 64, 4e-3
PLAN = SelectionPlan(experts=TopK(3), attention=TopK(2))


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a residual connection around it."""

    def __init__(self, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), attention
        self.feed_forward_norm, self.feed_forward = nn.LayerNorm(WIDTH), feed_forward

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD)).output
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD)).output


class VisionTransformer(nn.Module):
    """Patches of 2 x 2 pixels, learned positions, non-causal blocks, the mean of all patches."""

    def __init__(self, block: Callable[[], Block]) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH**2, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn((8 // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.digits = nn.Linear(WIDTH, 10)

    def forward(self, images_BHW: Tensor) -> Tensor:
        x_BTD = self.blocks(self.patches(patches(images_BHW)) + self.positions)
        return self.digits(self.norm(x_BTD).mean(1))


def patches(images_BHW: Tensor) -> Tensor:
    """Squares of pixels as vectors, row by row."""
    return rearrange(images_BHW, "b (h p) (w q) -> b (h w) (p q)", p=PATCH, q=PATCH)


def mixture() -> VisionTransformer:
    """All layers are mixtures."""
    return VisionTransformer(
        lambda: Block(
            MixtureOfAttentionHeads(
                WIDTH, ATTENTION_EXPERTS, 1, D_HEAD, causal=False, rope_theta=None
            ),
            MixtureOfExperts(WIDTH, EXPERTS, D_EXPERT),
        )
    )


def dense_twin() -> VisionTransformer:
    """The same widths without routers, to compare with."""
    return VisionTransformer(
        lambda: Block(
            GroupedQueryAttention(
                WIDTH, ATTENTION_EXPERTS, 1, D_HEAD, causal=False, rope_theta=None
            ),
            FeedForward(WIDTH, EXPERTS * D_EXPERT),
        )
    )


class Classifier(LightningModule):
    """Tells digits apart, by any vision transformer."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__()
        self.model = model
        self.steps = steps

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(warped(images)), labels, label_smoothing=0.1)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val/loss", F.cross_entropy(logits, labels))
        self.log("val/accuracy", (logits.argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=self.steps, pct_start=0.1
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class MixtureClassifier(Classifier):
    """The same for a model of mixtures."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__(model, steps)
        self.routing_loss = RoutingLoss(expert_mi=0.005, attention_mi=0.005)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with record_routings(self) as record:
            loss = super().training_step(batch, batch_idx)
        return loss + self.routing_loss(record)


def warped(images_BHW: Tensor) -> Tensor:
    """Images turned, scaled, sheared and moved a little, each in its own way."""
    affine = torch.eye(2, 3) + 0.1 * torch.randn(len(images_BHW), 2, 3)
    images = images_BHW[:, None]
    places = F.affine_grid(affine.to(images), images.shape, align_corners=False)
    return F.grid_sample(images, places, align_corners=False)[:, 0]


def digits(*, fold: int, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Four fifths of the images for training and one to test on, the same share of every digit."""
    pixels, labels = load_digits(return_X_y=True)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed).split(pixels, labels)
    images = rearrange(torch.tensor(pixels / 16).float(), "b (h w) -> b h w", h=8)
    train, test = ([images[i], torch.tensor(labels)[i]] for i in list(folds)[fold])
    return TensorDataset(*train), TensorDataset(*test)


def callbacks(steps: int) -> list[Callback]:
    """What trains a mixture to run under the plan."""
    return [
        MIWeightAnnealing(steps=max(1, steps // 10)),
        SparseFinishing(PLAN, steps=max(1, steps // 2)),
    ]


def reports() -> list[Callback]:
    """Heat maps of the experts, accuracy under the plan, and the sparse model in 8 bits."""
    return [
        ExpertUtilizationMonitor(),
        SparseEvaluation({"plan": PLAN}),
        SparseCompile(PLAN, quantization="int8"),
    ]


def fit(
    classifier: Classifier,
    train: TensorDataset,
    test: TensorDataset,
    callbacks: list[Callback],
    folder: Path,
) -> dict[str, float]:
    """Train, and test at the end; the folder is all that is written to."""
    trainer = Trainer(
        max_steps=classifier.steps,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=CSVLogger(folder, name="", version=""),
        accelerator="cpu",
        devices=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=classifier.steps,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True)
    trainer.fit(classifier, batches, DataLoader(test, BATCH_SIZE))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def main(folder: Path, steps: int = STEPS) -> None:
    """Train a mixture and its dense twin, and compare them on images that neither has seen."""
    train, test = digits(fold=0, seed=1)
    seed_everything(1)
    twin = fit(Classifier(dense_twin(), steps), train, test, [], folder / "twin")
    seed_everything(1)
    classifier = MixtureClassifier(mixture(), steps)
    every = callbacks(steps) + reports()
    found = fit(classifier, train, test, every, folder / "mixture")
    small = load_sparse(folder / "mixture" / "sparse", model=MixtureClassifier(mixture(), steps))
    images, labels = test.tensors
    correct = small(images).argmax(-1) == labels
    print(f"dense twin          {twin['val/accuracy']:.1%}")
    print(f"all experts         {found['val/accuracy']:.1%}")
    print(
        f"under the plan      {found['val/sparse/plan/accuracy']:.1%}, "
        f"{found['val/sparse/plan/active_share']:.1%} of the hidden parameters active"
    )
    print(f"the same in 8 bits  {correct.float().mean():.1%}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))

"""Training on two processes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.language_model import DSMoELanguageModel
from lightning_dsmoe.routing import LinearRouter, TopK

STEPS = 3
ROWS = 2


class Halves(LightningDataModule):
    """Batches of which each of two ranks gets one half, or one rank all."""

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        assert self.trainer is not None
        generator = torch.Generator().manual_seed(5)
        windows = torch.randint(11, (STEPS, 2, ROWS, 7), generator=generator)
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        mine = windows.flatten(1, 2) if ranks == 1 else windows[:, rank]
        items = [{"input_ids": w[..., :-1], "labels": w[..., 1:]} for w in mine]
        return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


def train(folder: Path, devices: int, **options: Any) -> DSMoELanguageModel:
    torch.manual_seed(3)
    router = partial(LinearRouter, init_std=1.0)
    model = DSMoELanguageModel(
        11,
        8,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4, router=router),
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=3, router=router),
        expert_mi_weight=1.0,
        attention_mi_weight=1.0,
        optimizer=partial(torch.optim.SGD, lr=0.005),
        **options,
    )
    model.configure_model()
    trainer = Trainer(
        accelerator="cpu",
        precision="64-true",
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=False,
        limit_val_batches=0,
        max_steps=STEPS,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Halves())
    return model


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"expert_selection": TopK(2), "consistency_weight": 1.0}],
    ids=["dense", "consistent"],
)
def test_two_ranks_train_as_one_process_with_both_halves(
    options: dict[str, Any], tmp_path: Path
) -> None:
    one, two = (train(tmp_path, devices, **options) for devices in (1, 2))
    for (name, expected), found in zip(one.named_parameters(), two.parameters(), strict=True):
        # Trained in float64, but spawned ranks hand their weights to a model in float32.
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-7, msg=name)

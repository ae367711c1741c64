"""Callbacks over two processes with batches of different sizes."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.callbacks import ExpertUtilizationMonitor, LayerSelections, SparseEvaluation
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.language_model import DSMoELanguageModel
from lightning_dsmoe.routing import LinearRouter, Threshold

SIZES = (1, 3)
WINDOWS = 2 * sum(SIZES)


class UnevenData(LightningDataModule):
    """Two batches for each of two ranks, or all windows for one."""

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        assert self.trainer is not None
        generator = torch.Generator().manual_seed(5)
        windows = torch.randint(11, (WINDOWS, 7), generator=generator)
        items = [{"input_ids": w[:-1], "labels": w[1:]} for w in windows]
        if self.trainer.world_size == 1:
            return DataLoader(items, batch_size=WINDOWS)  # type: ignore[arg-type]
        first = 2 * SIZES[0]
        mine = (items[:first], items[first:])[self.trainer.global_rank]
        return DataLoader(mine, batch_size=SIZES[self.trainer.global_rank])  # type: ignore[arg-type]


def validate(folder: Path, devices: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    router = partial(LinearRouter, init_std=1.0)
    model = DSMoELanguageModel(
        11,
        8,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4, router=router),
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=3, router=router),
    )
    model.configure_model()
    half = LayerSelections(experts=Threshold(0.5), attention=Threshold(0.5))
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        use_distributed_sampler=False,
        logger=CSVLogger(folder, name="logs"),
        callbacks=[ExpertUtilizationMonitor(), SparseEvaluation({"half": half})],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.validate(model, UnevenData(), verbose=False)
    return dict(trainer.callback_metrics)


@pytest.mark.ddp
def test_two_ranks_report_as_one_process(tmp_path: Path) -> None:
    one = validate(tmp_path / "one", 1)
    two = validate(tmp_path / "two", 2)
    names = [name for name in one if "/layer_" in name or "/sparse/" in name or name == "val/loss"]
    assert len(names) == 2 * 2 * 5 + 3 + 1
    for name in names:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6, msg=name)
    (folder,) = (tmp_path / "two").rglob("utilization")
    assert {path.name for path in folder.iterdir()} == {"val_step_00000000.png", "last.png"}

"""Training on two processes, which is to be that of one process on both halves of each batch."""

import os
import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning import Callback, LightningDataModule, Trainer
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.routing import LinearRouter, TopK
from lightning_dsmoe.serialization.checkpoint import load_decoder
from lightning_dsmoe.training.language_model import DSMoELanguageModel

STEPS = 4
ROWS = 2
SPARSE = {"expert_selection": TopK(2), "consistency_weight": 1.0, "checkpoint_activations": True}
CASES: dict[str, dict[str, Any]] = {"dense": {}, "consistent": SPARSE}


class Halves(LightningDataModule):
    """Batches of which each of two ranks gets one half, or one rank all; ends are padded."""

    def __init__(self, batches: int = STEPS) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        assert self.trainer is not None
        generator = torch.Generator().manual_seed(5)
        windows = torch.randint(11, (STEPS, 2, ROWS, 7), generator=generator)
        labels = windows[..., 1:].clone()
        labels[:, 0, 0, 2:] = -100
        labels[:, 1, 1, 5:] = -100
        labels[1, 1] = -100  # a rank without any token that counts
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        items = []
        for w, y in zip(windows[: self.batches], labels, strict=False):
            mine = slice(None) if ranks == 1 else slice(rank, rank + 1)
            tokens = w[mine].flatten(0, 1)[:, :-1]
            items.append({"input_ids": tokens, "labels": y[mine].flatten(0, 1)})
        return DataLoader(items, batch_size=None, generator=generator)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


class DrawsLabels(DSMoELanguageModel):
    """Draws from the generators of Python and NumPy too."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        labels = batch["labels"].clone()
        labels[:, 0], labels[:, 1] = random.randrange(11), int(np.random.randint(11))
        return super().training_step({**batch, "labels": labels}, batch_idx)


class SeedOfRank(Callback):
    """Begins with other random numbers on each rank and in each run."""

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        seed = 10 + trainer.global_rank + 100 * bool(trainer.ckpt_path)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


class SaveHalfWay(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == STEPS // 2:
            trainer.save_checkpoint(self.path)


def make_model(
    cls: type[DSMoELanguageModel] = DSMoELanguageModel, **options: Any
) -> DSMoELanguageModel:
    torch.manual_seed(3)
    router = partial(LinearRouter, init_std=1.0)
    weights = dict.fromkeys(("expert_mi_weight", "attention_mi_weight"), 1.0)
    more = dict.fromkeys(("load_balancing_weight", "router_z_weight"), 0.1)
    return cls(
        11,
        8,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4, router=router),
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=3, router=router),
        **{
            **weights,
            **more,
            "optimizer": partial(torch.optim.SGD, lr=0.005, momentum=0.9),
            **options,
        },
    )


def make_trainer(folder: Path, devices: int, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": devices,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        "logger": False,
        "limit_val_batches": 0,
        "max_steps": STEPS,
        "max_epochs": -1,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **options})


def sharded(**options: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(**{"data_parallel_size": 2, "tensor_parallel_size": 1, **options})


def state(model: DSMoELanguageModel) -> dict[str, Tensor]:
    found = {}
    for name, value in model.state_dict().items():
        found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return found


def train(
    folder: Path,
    devices: int,
    ckpt_path: Path | None = None,
    *,
    model: Any = None,
    batches: int = STEPS,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights after training, and what was logged in the last step."""
    model = model or make_model()
    trainer = make_trainer(folder, devices, **options)
    trainer.fit(model, Halves(batches), ckpt_path=ckpt_path, weights_only=True)
    return state(model), dict(trainer.callback_metrics)


def resumes(folder: Path, make_strategy: Callable[[], Any]) -> bool:
    """Whether a run that goes on from its middle ends bitwise as the one that went through."""
    path = folder / "middle.ckpt"

    def run(ckpt_path: Path | None, *more: Callback) -> dict[str, Tensor]:
        weights, _ = train(
            folder,
            2,
            ckpt_path,
            model=make_model(DrawsLabels, dropout=0.3),
            batches=1,  # all steps alike, so that only random numbers have to go on
            strategy=make_strategy(),
            callbacks=[SeedOfRank(), *more],
            limit_val_batches=1,
        )
        return weights

    straight, resumed = run(None, SaveHalfWay(path)), run(path)
    return all(torch.equal(resumed[name], value) for name, value in straight.items())


def message(folder: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match="ModelParallelStrategy") as error:
        train(folder, 2, **options)
    return str(error.value)


def state_saved_alone(folder: Path) -> Any:
    """The random states that one rank saves after an exception, while the other does not."""
    model = make_model()
    trainer = make_trainer(folder, 2, strategy="ddp")
    trainer.fit(model, Halves())
    trainer.state.status = TrainerStatus.INTERRUPTED
    checkpoint: dict[str, Any] = {}
    if trainer.is_global_zero:
        model.on_save_checkpoint(checkpoint)
    return checkpoint.get("random_state")


def run_rank(rank: int, folder: Path, port: int) -> None:
    """All runs of a rank, since starting processes takes longer than they do."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ.update(address)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", ".*sync_dist", PossibleUserWarning)
    found: dict[str, Any] = {}
    for name, options in CASES.items():
        found[f"ddp {name}"] = train(folder, 2, model=make_model(**options), strategy="ddp")
        found[f"fsdp2 {name}"] = train(folder, 2, model=make_model(**options), strategy=sharded())
    for name, make_strategy in {
        "ddp": lambda: "ddp",
        "folder": sharded,
        "file": partial(sharded, save_distributed_checkpoint=False),
    }.items():
        (folder / name).mkdir(exist_ok=True)
        found[f"resumed {name}"] = resumes(folder / name, make_strategy)
    found["refused"] = {
        "tensor_parallel_size=2": message(folder, strategy=ModelParallelStrategy()),
        "StochasticWeightAveraging": message(
            folder, strategy=sharded(), callbacks=[StochasticWeightAveraging(0.1)]
        ),
        "WeightAveraging": message(folder, strategy=sharded(), callbacks=[WeightAveraging()]),
    }
    found["saved alone"] = state_saved_alone(folder)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (folder, find_free_network_port())
    mp.start_processes(run_rank, arguments, nprocs=2, start_method="spawn")
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


pytestmark = [
    pytest.mark.ddp,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process_with_both_halves(
    strategy: str, case: str, ranks: Any, tmp_path: Path
) -> None:
    expected, logged = train(tmp_path, 1, model=make_model(**CASES[case]))
    for found in ranks[1]:
        weights, metrics = found[f"{strategy} {case}"]
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-7, msg=name)
        torch.testing.assert_close(metrics["train/loss"], logged["train/loss"])


@pytest.mark.parametrize("name", ["ddp", "folder", "file"])
def test_two_ranks_resume_bitwise_with_random_numbers_of_their_own(name: str, ranks: Any) -> None:
    assert [found[f"resumed {name}"] for found in ranks[1]] == [True, True]


def test_one_rank_saves_without_waiting_for_others_after_an_exception(ranks: Any) -> None:
    assert [found["saved alone"] for found in ranks[1]] == [None, None]


def test_a_file_of_sharded_weights_is_one_as_any_other(ranks: Any) -> None:
    decoder = load_decoder(ranks[0] / "file" / "middle.ckpt").decoder
    assert decoder.head.weight is decoder.embedding.weight


def test_other_numbers_of_processes_begin_new_random_numbers(
    ranks: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = ranks[0] / "ddp" / "middle.ckpt"
    assert len(torch.load(path)["random_state"]) == 2
    train(tmp_path, 1, path, limit_val_batches=1)
    expected = "random states of 2 processes and this run has 1"
    assert any(expected in str(warning.message) for warning in recwarn)


def test_strategies_that_would_train_otherwise_are_refused_by_name(ranks: Any) -> None:
    for found in ranks[1]:
        for name, text in found["refused"].items():
            assert name in text

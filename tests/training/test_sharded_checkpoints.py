"""Checkpoints of two sharded processes, resumed on any number of them."""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_dsmoe.cli import main
from lightning_dsmoe.decoder import Block
from lightning_dsmoe.files import hidden_beside
from lightning_dsmoe.inference import compile_sparse
from lightning_dsmoe.routing import SelectionPlan, TopK
from lightning_dsmoe.serialization.checkpoint import read_checkpoint
from lightning_dsmoe.training.language_model import DSMoELanguageModel

from .test_ranks import SaveHalfWay, make_model, make_trainer, message, sharded, train

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
}
COMPILED = {"compile_blocks": True, "checkpoint_activations": True}
pytestmark = [
    pytest.mark.ddp,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:the checkpoint holds the random states:UserWarning"),
]


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.all: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.all.append(float(trainer.callback_metrics["train/loss"]))


class WithScale(DSMoELanguageModel):
    """Has a parameter of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.ones(3))


def losses(
    folder: Path, ranks: int, optimizer: str, ckpt_path: Path | None = None, **options: Any
) -> list[float]:
    """The losses of four steps, or after a checkpoint of the second; all have the same batch."""
    found = Losses()
    callbacks = [found, *options.pop("callbacks", [])]
    model = make_model(optimizer=OPTIMIZERS[optimizer])
    train(folder, ranks, ckpt_path, model=model, batches=1, callbacks=callbacks, **options)
    return found.all


def placements(folder: Path) -> dict[str, Any]:
    """How untied embeddings, head and stacks are sharded."""
    model = make_model(tie_embeddings=False)
    trainer = make_trainer(folder, 2, strategy=sharded(), max_steps=1)
    trainer.fit(model, [])
    decoder = model.decoder
    return {
        "groups": [n for n, m in decoder.named_modules() if isinstance(m, FSDPModule)],
        "stacks": {
            name: (list(p.placements), list(p.to_local().shape), list(p.shape))
            for name, p in decoder.named_parameters()
            if isinstance(p, DTensor) and p.ndim == 3
        },
    }


def run_rank(rank: int, folder: Path, port: int) -> None:
    """All runs of a rank, since starting processes takes longer than they do."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ.update(address)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in OPTIMIZERS:
        path = folder / f"{name}.ckpt"
        save = SaveHalfWay(path)
        straight = losses(folder, 2, name, strategy=sharded(), callbacks=[save])
        found[f"{name} straight"] = straight
        found[f"{name} folder"] = losses(folder, 2, name, path, strategy=sharded())
        found[f"{name} file"] = losses(
            folder, 2, name, folder / f"{name}.1.ckpt", strategy=sharded()
        )
    found["placements"] = placements(folder)
    found["outside"] = message(folder, model=make_model(WithScale), strategy=sharded())
    whole = train(folder, 2, model=make_model(), strategy=sharded())[0]
    # One graph without a break, which is traced and not translated.
    compile_block = partial(nn.Module.compile, backend="eager", fullgraph=True)
    Block.compile = lambda block: compile_block(block)  # type: ignore[method-assign]
    compiled = train(folder, 2, model=make_model(**COMPILED), strategy=sharded())[0]
    found["compiled"] = all(torch.equal(compiled[name], value) for name, value in whole.items())
    for precision in ("bf16-mixed", "bf16-true"):
        options: dict[str, Any] = {"precision": precision, "max_steps": 2}
        for strategy in ("ddp", sharded()):
            weights = train(folder, 2, model=make_model(), strategy=strategy, **options)[0]
            found.setdefault(precision, []).append(weights)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for name in OPTIMIZERS:
        path = folder / f"{name}.1.ckpt"
        straight = losses(folder, 1, name, callbacks=[SaveHalfWay(path)])
        torch.save(straight, folder / f"{name}.losses")
    mp.start_processes(run_rank, (folder, find_free_network_port()), nprocs=2, start_method="spawn")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_resumes_on_any_number_of_processes(
    name: str, folder: Path, found: Any, tmp_path: Path
) -> None:
    straight = torch.load(folder / f"{name}.losses")
    close = partial(pytest.approx, rel=1e-6, abs=0)
    for rank in found:
        assert rank[f"{name} straight"] == close(straight)
        assert rank[f"{name} folder"] == close(straight[2:])  # of two, on two
        assert rank[f"{name} file"] == close(straight[2:])  # of one, on two
    assert losses(tmp_path, 1, name, folder / f"{name}.ckpt") == close(straight[2:])
    consolidated = tmp_path / "one" / "file.ckpt"
    main(["consolidate", f"--ckpt_path={folder / f'{name}.ckpt'}", f"--output={consolidated}"])
    assert losses(tmp_path, 1, name, consolidated) == close(straight[2:])


def test_a_consolidated_file_is_loaded_and_compiled(folder: Path, tmp_path: Path) -> None:
    path, source = tmp_path / "file.ckpt", folder / "adamw.ckpt"
    main(["consolidate", f"--ckpt_path={source}", f"--output={path}"])
    parts = {name: getattr(make_model(), name) for name in ("attention", "feed_forward")}
    model = DSMoELanguageModel.load_from_checkpoint(path, **parts).eval()
    tokens = torch.arange(10)[None]
    logits = model(tokens).logits
    for each in (path, source):
        sparse = compile_sparse(str(each), SelectionPlan(TopK(4), TopK(2)))
        torch.testing.assert_close(sparse(tokens).logits, logits, rtol=1e-5, atol=1e-6)
    expected = read_checkpoint(folder / "adamw.1.ckpt")["state_dict"]
    assert read_checkpoint(path)["state_dict"].keys() == expected.keys()


def test_the_place_has_nothing_but_whole_checkpoints(folder: Path) -> None:
    assert sorted(path.name for path in folder.glob("*.ckpt")) == [
        "adamw.1.ckpt",
        "adamw.ckpt",
        "sgd.1.ckpt",
        "sgd.ckpt",
    ]
    hidden = hidden_beside(folder / "sgd.ckpt").name
    assert not list(folder.glob(f"{hidden[:-32]}*"))


def test_stacks_are_sharded_along_experts(found: Any) -> None:
    for rank in found:
        groups = rank["placements"]["groups"]
        assert groups == ["", "embedding", "blocks.0", "blocks.1", "norm", "head"]
        stacks = rank["placements"]["stacks"]
        assert stacks
        for placed, local, whole in stacks.values():
            assert placed == [Shard(0)]
            assert local == [whole[0] // 2, *whole[1:]]


def test_parameters_that_nothing_shards_are_refused_by_name(found: Any) -> None:
    assert all("outside the decoder: scale;" in rank["outside"] for rank in found)


def test_compiled_blocks_stay_one_graph_and_train_alike(found: Any) -> None:
    assert [rank["compiled"] for rank in found] == [True, True]


@pytest.mark.parametrize(("precision", "atol"), [("bf16-mixed", 2e-7), ("bf16-true", 4e-3)])
def test_half_precision_rounds_where_ddp_does(precision: str, atol: float, found: Any) -> None:
    for rank in found:
        ddp, fsdp2 = rank[precision]
        for name, value in ddp.items():
            torch.testing.assert_close(fsdp2[name], value, rtol=0, atol=atol, msg=name)

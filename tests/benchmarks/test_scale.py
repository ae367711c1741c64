"""What training on many GPUs should take, against what two processes send and what a step keeps."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from benchmarks.scale import __main__ as command
from benchmarks.scale.costs import (
    GPUS,
    Traffic,
    ddp_traffic,
    fsdp2_traffic,
    memory,
    mfu,
    padded,
)
from benchmarks.scale.counts import Counts, KeptBytes, count
from lightning_dsmoe import DSMoELanguageModel, MixtureOfAttentionHeads, MixtureOfExperts
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.training.objective import Step, objective

from ..ranks import on_two_ranks

V, D, LAYERS, B, T, BATCHES = 11, 8, 3, 2, 6, 2


def make_model(**options: Any) -> DSMoELanguageModel:
    """A model whose experts, an odd number, leave shards of unequal sizes."""
    sizes: dict[str, Any] = {"vocab_size": V, "d_model": D, "n_layers": LAYERS, **options}
    return DSMoELanguageModel(
        **sizes,
        attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4),
        feed_forward=partial(MixtureOfExperts, n_experts=5, d_expert=6),
        load_balancing_weight=0.1,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )


@pytest.fixture(scope="module")
def counts() -> Counts:
    return count("small", make_model, n_layers=LAYERS, batch_size=B, context=T)


def batches(accumulate: int) -> DataLoader[Any]:
    tokens = torch.arange(B * T * 2 * accumulate).reshape(-1, B, T) % V
    items = [{"input_ids": each, "labels": each} for each in tokens]
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


COLLECTIVES = ("all_reduce", "all_gather_single", "reduce_scatter_single")


class CountSent(Callback):
    """Counts the bytes that collectives of each batch are given, or give."""

    def __init__(self) -> None:
        self.total = dict.fromkeys(COLLECTIVES, 0.0)
        self.after_batches: list[Traffic] = []

    def note(self, name: str, tensor: Tensor) -> None:
        self.total[name] += tensor.numel() * tensor.element_size()

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            # Otherwise DDP calls its collectives outside of Python.
            trainer.strategy.model.register_comm_hook(dist.group.WORLD, allreduce_hook)

    def on_train_batch_end(self, *_: Any) -> None:
        self.after_batches.append(Traffic(*self.total.values()))


def sent(counting: CountSent, strategy: Any, accumulate: int) -> Traffic:
    """Bytes of the second of two steps."""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=2,
        callbacks=[counting],
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with ExitStack() as patches:
        for name in COLLECTIVES:
            patches.enter_context(patch.object(dist, name, counted(counting, name)))
        trainer.fit(make_model(), batches(accumulate))
    before, after = counting.after_batches[accumulate - 1], counting.after_batches[-1]
    return Traffic(*(b - a for a, b in zip(before, after, strict=True)))


def counted(counting: CountSent, name: str) -> Callable[..., Any]:
    original = getattr(dist, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        counting.note(name, kwargs["input"] if "input" in kwargs else args[0])
        return original(*args, **kwargs)

    return call


def run(rank: int) -> dict[str, tuple[float, ...]]:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    found = {}
    for accumulate in (1, BATCHES):
        ddp, sharded = CountSent(), CountSent()
        found[f"ddp {accumulate}"] = tuple(sent(ddp, "ddp", accumulate))
        mesh = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        found[f"fsdp2 {accumulate}"] = tuple(sent(sharded, mesh, accumulate))
    return found


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_send_what_is_told(counts: Counts, tmp_path: Path) -> None:
    for found in on_two_ranks(run, tmp_path):
        for accumulate in (1, BATCHES):
            # The simulator deals the batches of one GPU to all of them.
            dealt = counts._replace(accumulate=2 * accumulate)
            assert found[f"ddp {accumulate}"] == tuple(ddp_traffic(dealt, 2))
            assert found[f"fsdp2 {accumulate}"] == tuple(fsdp2_traffic(dealt, 2))


def test_parameters_and_operations_are_those_of_the_model(counts: Counts) -> None:
    model = make_model()
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    products = sum(p.numel() for p in model.decoder.parameters() if p.ndim > 1)
    attention = LAYERS * 2 * (2 * T * (2 * 4))  # scores and values of two heads of four channels
    assert counts.flops == pytest.approx(3 * B * T * (2 * products + attention), rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_keeps_the_bytes_that_are_told(counts: Counts, recompute: bool) -> None:
    def kept(n_layers: int) -> int:
        model = make_model(n_layers=n_layers, checkpoint_activations=recompute)
        batch = next(iter(batches(1)))
        with torch.autocast("cpu", torch.bfloat16):
            keeping = KeptBytes(model.decoder)
            with keeping:
                step = Step.of(model, batch, SelectionPlan())
                total, _ = objective(step, model.routing_loss)
        total.backward()
        return keeping.total

    if recompute:
        assert counts.kept_checkpointed < counts.kept
        assert counts.kept_checkpointed >= kept(LAYERS)
    else:
        assert counts.kept == pytest.approx(kept(LAYERS), rel=0.005)  # token ids, once or twice


def test_shards_are_of_one_size() -> None:
    shape = torch.Size([5, 3])
    assert [padded(shape, gpus) for gpus in (1, 2, 5, 8)] == [15, 18, 15, 24]
    experts = torch.Size([4, 16, 2])
    assert [padded(experts, gpus) for gpus in (4, 8, 16, 32)] == [128, 128, 128, 32 * 32]


def test_a_ring_sends_an_all_reduce_twice_around() -> None:
    assert Traffic(8.0, 4.0, 2.0).per_gpu(2) == (2 * 8 + 4 + 2) / 2
    assert Traffic(8.0, 4.0, 2.0).per_gpu(1) == 0


def test_memory_of_a_hand_count(counts: Counts) -> None:
    whole = 20 * counts.parameters + counts.kept
    assert memory(counts, 4, sharded=False, recompute=False) == whole
    outside, *blocks = (sum(prod(shape) for shape in unit) for unit in counts.units)
    alone = 16 * counts.parameters + 4 * (outside + 3 * max(blocks)) + counts.kept_checkpointed
    assert memory(counts, 1, sharded=True, recompute=True) == alone


def test_what_is_sent_lowers_utilization_where_nothing_hides_it(counts: Counts) -> None:
    gpu = GPUS["h100"]
    alone = mfu(counts, gpu, 1, Traffic(), recompute=False, sharded=False)
    assert alone.hidden == pytest.approx(0.6) == alone.exposed
    again = mfu(counts, gpu, 1, Traffic(), recompute=True, sharded=False)
    assert 0.75 * 0.6 <= again.hidden < 0.6
    near, far = (
        mfu(counts, gpu, gpus, fsdp2_traffic(counts, gpus), recompute=False, sharded=True)
        for gpus in (8, 16)
    )
    assert 0.6 >= near.hidden >= near.exposed > far.exposed


def test_the_table_is_the_same_each_time(
    counts: Counts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "paper_counts", lambda size, batch_size: counts)
    monkeypatch.setattr(sys, "argv", ["scale", "--model", "1b", "--gpus", "1", "8"])
    command.main()
    first = capsys.readouterr().out
    command.main()
    assert capsys.readouterr().out == first
    assert "not measured" in first
    assert sum(line.startswith("| small") for line in first.splitlines()) == 4


@pytest.mark.parametrize("given", [["--gpus", "0"], ["--gpu", "abacus"], ["--model", "7b"]])
def test_a_mistake_is_one_line(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scale", *given])
    with pytest.raises(SystemExit) as error:
        command.main()
    assert error.value.code == 2

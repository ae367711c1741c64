"""Tokens, operations and the MFU of training, on a clock that the test moves."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dsmoe.callbacks import ThroughputMonitor, throughput_monitor
from lightning_dsmoe.callbacks.step_flops import StepFlops
from lightning_dsmoe.optimizers import MuonWithAdamW
from lightning_dsmoe.training.language_model import DSMoELanguageModel

from .classifier import classifier, loader
from .test_yaml import parse

B, T = 3, 6
about = partial(pytest.approx, rel=0.01)  # routing losses are no part of the formula


class Clock(Callback):
    """A batch of training takes a second, and a batch of validation a hundred."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def on_before_backward(self, *_: Any) -> None:
        self.now += 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.now += 100


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Reports(Callback):
    """All that a monitor reported, with the steps."""

    def __init__(self, monitor: ThroughputMonitor) -> None:
        self.monitor = monitor
        self.reports: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.monitor.results and all(
            self.monitor.results is not r for r in self.reports.values()
        ):
            self.reports[trainer.global_step] = self.monitor.results


def by_formula(model: DSMoELanguageModel, n_tokens: int, context: int) -> int:
    """6 for each token and weight of a matrix product, 12 for each channel and pair of tokens."""
    matrices = sum(p.numel() for p in set(model.decoder.parameters()) if p.ndim > 1)
    heads = sum(b.attention.n_experts * b.attention.n_heads for b in model.decoder.blocks)
    channels = heads * model.decoder.blocks[0].attention.d_head
    return 6 * matrices * n_tokens + 12 * channels * context * n_tokens


def counted(model: DSMoELanguageModel, step: Callable[[], Tensor]) -> int:
    flops = StepFlops()
    flops.open()
    loss = step()
    flops.before_backward()
    loss.backward()
    flops.after_backward()
    torch.ones(9, 9) @ torch.ones(9, 9)  # such as an optimizer's
    return flops.close()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_of_the_formula(
    device: str, tied: bool, recompute: bool, make_model: Callable[..., DSMoELanguageModel]
) -> None:
    options: Any = {"tie_embeddings": tied, "checkpoint_activations": recompute}
    model = make_model(**options).to(device)
    tokens = torch.zeros(B, T, dtype=torch.long, device=device)
    found = counted(model, lambda: model(tokens).logits.sum())
    embeddings = 0 if tied else model.decoder.embedding.weight.numel()
    assert found == by_formula(model, B * T, T) - 6 * embeddings * B * T


def test_frozen_layers_need_no_backward_pass() -> None:
    """What the counter found, where three times the forward pass would be too much."""
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).requires_grad_(False)
    model[1].requires_grad_(True)
    x = torch.ones(5, 8)
    assert counted(model, lambda: model(x).sum()) == 2 * 5 * (8 * 16 + 16 * 4 + 16 * 4)


def test_reports_of_known_time(
    clock: Clock,
    make_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    """Two batches warm up; five of 18 tokens take a second each, validation stops the clock."""
    monitor = ThroughputMonitor(every_n_steps=5)
    reports = Reports(monitor)
    model = make_model()
    trainer = make_trainer(
        max_steps=12, callbacks=[monitor, reports, clock], val_check_interval=4, limit_val_batches=2
    )
    trainer.fit(model, make_loader(20), make_loader(3))
    assert list(reports.reports) == [7, 12]
    for report in reports.reports.values():
        assert report["train/tokens_per_sec"] == B * T
        assert report["train/flops_per_sec"] == about(by_formula(model, B * T, T))
        assert "train/mfu" not in report
    assert trainer.callback_metrics["train/tokens_per_sec"] == B * T


def test_accumulated_batches_all_count(
    clock: Clock,
    make_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    monitor = ThroughputMonitor(every_n_steps=2)
    reports = Reports(monitor)
    trainer = make_trainer(
        max_steps=5, accumulate_grad_batches=3, callbacks=[monitor, reports, clock]
    )
    trainer.fit(make_model(), make_loader(20), make_loader(3))
    assert list(reports.reports) == [2, 4]
    assert {r["train/tokens_per_sec"] for r in reports.reports.values()} == {B * T}


def test_smaller_batches_count_for_what_they_are(
    clock: Clock,
    make_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    """The rest of a run is reported at its end: one batch of 18 tokens and one of 12."""
    monitor = ThroughputMonitor()
    model = make_model()
    make_trainer(max_epochs=1, callbacks=[monitor, clock]).fit(
        model, make_loader(4), make_loader(3)
    )
    assert monitor.results["train/tokens_per_sec"] == 15
    assert monitor.results["train/flops_per_sec"] == about(by_formula(model, 15, T))


def test_a_second_fit_begins_anew(
    clock: Clock,
    make_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    monitor = ThroughputMonitor(every_n_steps=100)
    trainer = make_trainer(max_steps=5, callbacks=[monitor, clock])
    trainer.fit(make_model(), make_loader(20), make_loader(3))
    before = monitor.results
    clock.now += 1000
    trainer.fit_loop.epoch_loop.max_steps = 10
    trainer.fit(make_model(), make_loader(20), make_loader(3))
    assert monitor.results == before
    assert monitor.results is not before


def test_the_last_report_stands_if_no_batch_comes_after_it(
    clock: Clock,
    make_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    """Though time goes on, as while a checkpoint is written."""

    class Later(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            clock.now += 1

    monitor = ThroughputMonitor(every_n_steps=2)
    trainer = make_trainer(max_steps=4, callbacks=[monitor, clock, Later()])
    trainer.fit(make_model(), make_loader(20), make_loader(3))
    assert monitor.results["train/tokens_per_sec"] == B * T


def test_a_fit_without_a_batch_leaves_no_counter_behind(
    make_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    """Lightning ends an epoch where this hook of a model gives -1."""
    monitor, model = ThroughputMonitor(), make_model()
    model.on_train_batch_start = lambda *_: -1
    trainer = make_trainer(max_epochs=1, callbacks=[monitor])
    trainer.fit(model, make_loader(20), make_loader(3))
    assert monitor.results == {}
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_model_that_is_not_ours(clock: Clock, make_trainer: Callable[..., Trainer]) -> None:
    """Integers are tokens; Lightning's name for known operations is used."""
    monitor = ThroughputMonitor()
    make_trainer(max_epochs=1, callbacks=[monitor, clock]).fit(classifier(), loader(16), loader(4))
    assert monitor.results["train/tokens_per_sec"] == 4 * 6
    assert monitor.results["train/flops_per_sec"] > 0
    monitor, model = ThroughputMonitor(tokens=lambda batch: len(batch[1])), classifier()
    model.flops_per_batch = 1000
    make_trainer(max_epochs=1, callbacks=[monitor, clock]).fit(model, loader(16), loader(4))
    assert monitor.results == {"train/tokens_per_sec": 4, "train/flops_per_sec": 1000}


class TwoOptimizers(LightningModule):
    """Manual optimization, a backward pass for each of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for layer, optimizer in zip(self.layers, self.optimizers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(layer(batch).sum())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters()) for layer in self.layers]


def test_manual_optimization(clock: Clock, make_trainer: Callable[..., Trainer]) -> None:
    """Both passes count, at two seconds a batch here; images are counted by samples."""
    monitor = ThroughputMonitor(every_n_steps=3)
    data: DataLoader[Any] = DataLoader(torch.ones(40, 8), batch_size=4)  # type: ignore[arg-type]
    trainer = make_trainer(max_steps=14, callbacks=[monitor, clock])
    trainer.fit(TwoOptimizers(), data)
    assert monitor.results["train/tokens_per_sec"] == 2
    assert monitor.results["train/flops_per_sec"] == 2 * (2 * 4 * 8 * 8 * 2) / 2


def test_the_mfu_of_a_card(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    make_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    """Of the optimizer's products, of which Muon has many, none counts."""
    asked = []

    def peak_flops(name: str, dtype: torch.dtype) -> float:
        asked.append((name, dtype))
        return 1e6

    monkeypatch.setattr(throughput_monitor, "peak_flops", peak_flops)
    monitor = ThroughputMonitor()
    model = make_model(optimizer=partial(MuonWithAdamW, lr=1e-3))
    trainer = make_trainer(max_steps=4, precision="bf16-mixed", callbacks=[monitor, clock])
    trainer.fit(model, make_loader(20), make_loader(3))
    assert asked == [("CPU", torch.bfloat16)]
    assert monitor.results["train/mfu"] == about(by_formula(model, B * T, T) / 1e6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by dynamo too
def test_compiled_blocks_are_counted_uncompiled(
    clock: Clock,
    make_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    """Also in a second fit, where the compiled code is there already."""
    model = make_model()
    for block in model.decoder.blocks:
        block.compile(backend=hidden_from_counters)
    for _ in range(2):
        monitor = ThroughputMonitor()
        trainer = make_trainer(max_steps=3, callbacks=[monitor, clock])
        trainer.fit(model, make_loader(20), make_loader(3))
        assert monitor.results["train/flops_per_sec"] == about(by_formula(model, B * T, T))


def hidden_from_counters(graph: Any, inputs: Any) -> Any:
    """Runs a graph as kernels of Inductor would, unseen by dispatch modes."""
    run = graph.forward

    def hidden(*arguments: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return run(*arguments)

    return hidden


def test_a_failing_step_leaves_no_counter_behind(
    make_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a mistake")

    monitor, model = ThroughputMonitor(), make_model()
    monkeypatch.setattr(model, "training_step", fail)
    with pytest.raises(KeyError, match="a mistake"):
        make_trainer(max_steps=1, callbacks=[monitor]).fit(model, make_loader(2), make_loader(3))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_number_of_steps_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        ThroughputMonitor(every_n_steps=0)


def test_options_in_yaml() -> None:
    kind = "class_path: lightning_dsmoe.callbacks.ThroughputMonitor"
    plain, own = parse(
        f"[{{{kind}}}, {{{kind}, init_args: {{every_n_steps: 7, tokens: builtins.len}}}}]"
    )
    assert isinstance(plain, ThroughputMonitor)
    assert isinstance(own, ThroughputMonitor)
    assert (plain.every_n_steps, plain.tokens) == (50, throughput_monitor.batch_tokens)
    assert (own.every_n_steps, own.tokens) == (7, len)


def test_batches_of_any_kind() -> None:
    ids, images = torch.zeros(2, 5, dtype=torch.long), torch.zeros(3, 1, 4, 4)
    count = throughput_monitor.batch_tokens
    assert [count(each) for each in (ids, [ids, ids], {"labels": ids, "input_ids": ids})] == [
        10
    ] * 3
    assert count({"image": images, "label": torch.zeros(3)}) == 3
    assert count("text") == 0
    assert count(torch.tensor(1.0)) == 1

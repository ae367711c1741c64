"""Steps with compiled blocks: one graph for each block, and the same one in all steps."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import nn
from torch._dynamo.utils import counters

from lightning_dsmoe.decoder import Block
from lightning_dsmoe.routing import TopK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


class Graphs(Callback):
    """The number of graphs after each batch of training."""

    def __init__(self) -> None:
        self.after_batch: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.after_batch.append(counters["stats"]["unique_graphs"])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Blocks are traced, not translated; a break or a block that is not compiled is an error."""
    trace = {"backend": "eager", "fullgraph": True}
    monkeypatch.setattr(Block, "compile", lambda block: nn.Module.compile(block, **trace))
    torch._dynamo.reset()
    counters.clear()
    yield Graphs()
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_one_graph_serves_all_blocks_and_steps(
    graphs: Graphs,
    make_one_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    """The last batch, which is shorter, adds one for any size, and validation one of its own."""
    model = make_one_model(compile_blocks=True, dropout=0.1)
    assert model.n_layers > 1
    options = {"precision": "bf16-mixed", "max_epochs": 2, "limit_val_batches": 0}
    trainer = make_trainer(callbacks=[graphs], **options)
    trainer.fit(model, make_loader(8), make_loader(3))
    n_batches = trainer.num_training_batches
    assert n_batches > 2
    assert graphs.after_batch == [1] * (n_batches - 1) + [2] * (n_batches + 1)


def test_a_consistent_plan_adds_one_graph(
    graphs: Graphs,
    make_one_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    model = make_one_model(
        compile_blocks=True, consistency_weight=0.5, expert_selection=TopK(1), dropout=0.1
    )
    options = {"precision": "bf16-mixed", "max_steps": 3, "limit_val_batches": 0}
    make_trainer(callbacks=[graphs], **options).fit(model, make_loader(), make_loader(3))
    assert graphs.after_batch == [2, 2, 2]

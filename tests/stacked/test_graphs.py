"""Every block as one graph: `torch.export` under a plan, `torch.compile` with all experts.

Shapes: B sequences, T positions, D width.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe import (
    AllExperts,
    FeedForward,
    GLUExperts,
    GroupedQueryAttention,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    Threshold,
    TopK,
    run_plan,
)
from lightning_dsmoe.routing import Selection

D = 64
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "experts": partial(MixtureOfExperts, D, 8, 128, d_shared=16),
    "gated experts": partial(
        MixtureOfExperts, D, 4, 128, experts=partial(GLUExperts, activation="silu", bias=True)
    ),
    "heads": partial(MixtureOfAttentionHeads, D, 4, 2, 64, qk_norm=True, bias=True),
    "heads of an encoder": partial(MixtureOfAttentionHeads, D, 4, 2, 64, causal=False),
    "feed-forward": partial(FeedForward, D, 128),
    "attention": partial(GroupedQueryAttention, D, 4, 2, 16),
}


class Selected(nn.Module):
    def __init__(self, layer: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.layer = layer
        self.selection = selection

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x, self.selection).output
        return output


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS)
def block(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = request.param()
    if hasattr(layer, "router"):
        nn.init.normal_(layer.router.weight)
    return layer


def tokens(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("selection", [TopK(2), Threshold(0.9)], ids=str)
@torch.no_grad()
def test_export_under_a_selection(selection: Selection, block: nn.Module) -> None:
    module = Selected(block, selection).eval()
    # So many tokens that they are sorted by expert elsewhere, and a few.
    x = tokens(2, 600) if selection == TopK(2) else tokens(1, 3)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_export_inside_a_plan() -> None:
    model = Selected(MixtureOfExperts(D, 8, 128), AllExperts()).eval()
    nn.init.normal_(model.layer.router.weight)  # type: ignore[union-attr, arg-type]
    with run_plan(model, SelectionPlan(experts=TopK(2))):
        program = torch.export.export(model, (tokens(2, 5),), strict=False)
    expected = model.layer(tokens(2, 5), TopK(2)).output
    torch.testing.assert_close(program.module()(tokens(2, 5)), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by dynamo too
def test_compiled_whole(block: nn.Module) -> None:
    module = Selected(block, AllExperts())
    torch._dynamo.reset()  # which counts what it compiles of one function
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, module):
        x = tokens(2, 600).requires_grad_()
        run(x).square().mean().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
        module.zero_grad()
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)

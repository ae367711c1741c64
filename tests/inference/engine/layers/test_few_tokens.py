"""Layers on a few tokens, uncompiled and compiled, against the trained layers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dsmoe.experts import GLUExperts, MixtureOfExperts, MLPExperts
from lightning_dsmoe.inference.engine.decode import compiled_step, kernel_source
from lightning_dsmoe.inference.engine.decode.same_graph import differ_in_weights_alone
from lightning_dsmoe.inference.engine.layers import few_tokens as module
from lightning_dsmoe.inference.engine.layers.few_tokens import (
    MAX_TOKENS,
    FewTokens,
    gather_tokens,
)
from lightning_dsmoe.inference.engine.layers.packed_layers import pack_layers
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.weights.row_major import quantize_int8
from lightning_dsmoe.routing import Selection, TopK, routed_layers

from ..conftest import FEED_FORWARD, SELECTIONS, assert_near


def biased(d_model: int, n_experts: int, d_expert: int) -> MLPExperts:
    return MLPExperts(d_model, n_experts, d_expert, bias=True, activation="relu")


LAYERS = [
    lambda: FEED_FORWARD(24),
    lambda: FEED_FORWARD(24, experts=biased, d_shared=7),
    lambda: FEED_FORWARD(24, experts=GLUExperts, gate_scale="sum_to_one"),
]


def packed(layer: MixtureOfExperts, points: SwitchPoints = SwitchPoints(), **options: Any) -> Any:
    twin = copy.deepcopy(layer).eval().requires_grad_(False)
    pack_layers(twin, {"": TopK(1)}, FewTokens(points), **options)
    return twin


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@torch.no_grad()
def test_outputs_and_routings(selection: Selection, make: Callable[[], MixtureOfExperts]) -> None:
    layer = make()
    for n_tokens in (1, 3):
        x = torch.randn(n_tokens, 24)
        expected = layer(x, selection)
        actual = gather_tokens(packed(layer), selection, x)
        assert_near(actual.output, expected.output)
        assert_near(actual.routing.logits, expected.routing.logits)
        assert_near(actual.routing.probs, expected.routing.probs)


@torch.no_grad()
def test_8_bits_are_those_of_many_tokens() -> None:
    twin = packed(LAYERS[1](), SwitchPoints(gather_up_to=0), quantizer=quantize_int8)
    x = torch.randn(2, 24)
    assert_near(gather_tokens(twin, TopK(2), x).output, twin(x, TopK(2)).output)


@pytest.mark.parametrize("n_tokens", [0, MAX_TOKENS + 1])
def test_many_tokens_are_not_few(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.FewTokens, "_compile", None)
    few = FewTokens(SwitchPoints())
    assert few(packed(LAYERS[0]()), TopK(1), torch.randn(n_tokens, 24)) is None
    never = FewTokens(SwitchPoints(gather_up_to=0))
    assert never(packed(LAYERS[0]()), TopK(1), torch.randn(1, 24)) is None


def test_layers_that_differ_in_weights_alone() -> None:
    same = [LAYERS[1](), LAYERS[1]()]
    assert differ_in_weights_alone(*same)
    for change in (
        lambda layer: setattr(layer.experts, "activation", "silu"),
        lambda layer: setattr(layer.router, "table", torch.ones(2)),
        lambda layer: setattr(layer, "gate_factor", 1.0),
        lambda layer: setattr(layer, "shared", None),
        lambda layer: layer.router.register_forward_hook(print),
        lambda layer: setattr(layer, "router", nn.Linear(24, 5)),
    ):
        other = copy.deepcopy(same[1])
        change(other)
        assert not differ_in_weights_alone(same[0], other)


@torch.no_grad()
def test_without_a_compiler_layers_run_more_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernel_source, "start", missing)
    layer, x = LAYERS[0](), torch.randn(2, 24)
    twin = packed(layer)
    with pytest.warns(UserWarning, match="layers run uncompiled, more slowly: no compiler"):
        y = twin(x).output
    assert_near(y, layer(x, TopK(1)).output)
    assert_near(twin(x).output, y)  # without another warning
    assert not twin.few_tokens._source._beside
    twin.few_tokens.forget_failures()
    with pytest.warns(UserWarning, match="no compiler; once that is mended, warm_up compiles them"):
        twin(x)


@pytest.mark.slow
@torch.no_grad()
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([LAYERS[1](), LAYERS[1](), LAYERS[2]()]).eval().requires_grad_(False)
    twins = copy.deepcopy(model)
    few = FewTokens(SwitchPoints())
    few.waits = True
    pack_layers(twins, dict.fromkeys(routed_layers(model), TopK(2)), few)
    compiled = []

    def counted(parts: Any, *args: Any) -> Any:
        compiled.append(parts)
        return compiled_step.kernels_of(parts, *args)

    monkeypatch.setattr(kernel_source, "kernels_of", counted)

    def check(twins: nn.ModuleList, dtype: torch.dtype = torch.float32) -> None:
        for layer, twin in zip(model, twins, strict=True):
            x = torch.randn(1, 1, 24)
            expected = layer(x, TopK(2))
            found = twin(x.to(dtype))
            assert found.output.dtype == dtype
            exact = 2e-6 if dtype == torch.float32 else 0.05
            assert_near(found.output.float(), expected.output, exact)
            assert_near(found.routing.probs, expected.routing.probs, exact)

    check(twins)
    assert len(compiled) == 2  # layers alike share a kernel
    for layer in (*model, *twins):
        layer.router.weight.data = layer.router.weight.flip(0)  # seen by the next call
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    check(twins)
    few.waits = False
    assert pickle.loads(pickle.dumps(few)).switch_points == few.switch_points
    twins = pickle.loads(pickle.dumps(twins))
    for twin in twins:
        twin.few_tokens.waits = True
    check(twins)
    check(twins.bfloat16(), torch.bfloat16)

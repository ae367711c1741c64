"""The way of a GPU through a whole decoder, on the CPU: what it gives, and that it never waits."""

from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MLPExperts
from lightning_dsmoe.inference import Remaining, prune
from lightning_dsmoe.inference.engine.batched import gpu_costs, grouped_layers, grouped_mm_layers
from lightning_dsmoe.inference.engine.batched.forward import forward_tokens
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.routing import AllExperts, Selection, Threshold, TopK, TopP

from ....pairwise import pairwise
from ..conftest import (
    ATTENTION,
    FEED_FORWARD,
    SELECTIONS,
    V,
    assert_near,
    learned_positions_glu,
    packed,
    rotary_mlp,
    uneven,
    uniform,
    unlike_layers,
)

pytestmark = pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="torch.nn.functional.grouped_mm came with torch 2.10"
)

ALIGNED = [rotary_mlp, unlike_layers]
WAITING = {
    *("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"),
    *("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal"),
}


class Operators(TorchDispatchMode):
    """Notes each operator that runs."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = [t for some in args if isinstance(some, list | tuple) for t in some]
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        name = func.overloadpacket.__name__
        self.names.append("nonzero" if by_mask and name.startswith("index") else name)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Notes what is called of tensors: `tolist` runs no operator on a CPU."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


class Calls:
    """What runs, and what of that waits for a device."""

    def __init__(self) -> None:
        self.operators: list[str] = []
        self.functions: list[str] = []

    def __enter__(self) -> Self:
        self._modes = ExitStack()
        for mode in (Operators(self.operators), Functions(self.functions)):
            self._modes.enter_context(mode)
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    @property
    def waiting(self) -> list[str]:
        return [name for name in self.operators + self.functions if name in WAITING]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_mm_layers, "is_possible", grouped_mm_layers.fit)
    monkeypatch.setattr(gpu_costs, "grouping_pays", lambda *args: True)


@pytest.mark.parametrize(
    ("selection", "make_decoder", "batch", "int8"),
    pairwise(selection=SELECTIONS, make_decoder=ALIGNED, batch=[1, 3], int8=[False, True]),
)
@torch.no_grad()
def test_logits_are_those_of_the_other_methods(
    selection: Selection, batch: int, int8: bool, decoder: Decoder, tokens: Tensor, mask: Tensor
) -> None:
    twin, plan, tokens = packed(decoder, int8=int8), uniform(selection), tokens[:batch]
    for some in (None, mask[-batch:]):
        expected = twin(tokens, plan, mask=some)
        with Calls() as calls:
            actual = forward_tokens(twin, tokens, plan, grouped=True, mask=some)
        assert_near(actual.logits, expected.logits)
        assert ("_grouped_mm" in calls.operators) == (selection != AllExperts())


@torch.no_grad()
def test_a_cache_is_filled_alike(tokens: Tensor, mask: Tensor) -> None:
    twin, plan = packed(rotary_mlp()), uniform(TopK(2))
    caches = [DecoderCache(twin, 3, 14) for _ in range(2)]
    for part, some in zip(tokens.split((9, 1, 4), 1), mask.split((9, 1, 4), 1), strict=True):
        actual, expected = (
            forward_tokens(twin, part, plan, grouped=grouped, mask=some, caches=cache.layers).logits
            for grouped, cache in zip((True, False), caches, strict=True)
        )
        assert_near(actual, expected)


@pytest.mark.parametrize("rule", [TopK(2), TopK(1, renormalize=True), Threshold(2.5), TopP(0.1)])
@torch.no_grad()
def test_nothing_waits_for_the_device_where_the_selection_says_enough(
    rule: Selection, tokens: Tensor, mask: Tensor
) -> None:
    twin = packed(rotary_mlp())
    cache = DecoderCache(twin, 3, 14)
    with Calls() as calls:
        for part, some in zip(tokens.split((9, 1, 4), 1), mask.split((9, 1, 4), 1), strict=True):
            forward_tokens(twin, part, uniform(rule), grouped=True, mask=some, caches=cache.layers)
    assert calls.operators.count("_grouped_mm") >= 3 * 2 * 2
    assert calls.waiting == []


@torch.no_grad()
def test_a_threshold_that_says_little_waits_once_in_a_layer(tokens: Tensor) -> None:
    twin = packed(rotary_mlp())
    with Calls() as calls:
        forward_tokens(twin, tokens, uniform(Threshold(0.8)), grouped=True)
    assert calls.waiting == ["tolist"] * 2 * 2


@torch.no_grad()
def test_the_method_that_waits_is_seen_to(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_mm_layers, "is_possible", lambda *args: False)
    monkeypatch.setattr(grouped_layers, "grouping_pays", lambda *args: True)
    with Calls() as calls:
        forward_tokens(packed(rotary_mlp()), tokens, uniform(TopK(2)), grouped=True)
    assert {"tolist", "nonzero"} <= {*calls.waiting}


@torch.no_grad()
def test_widths_that_do_not_fit_take_the_other_method(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_layers, "grouping_pays", lambda *args: True)
    twin, plan = packed(learned_positions_glu()), uniform(TopK(2))
    with Calls() as calls:
        actual = forward_tokens(twin, tokens, plan, grouped=True).logits
    assert calls.operators.count("_grouped_mm") == 2 * 2  # attention alone
    assert_near(actual, forward_tokens(twin, tokens, plan, grouped=False).logits)


@torch.no_grad()
def test_where_it_does_not_pay_all_experts_run(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def never(*args: int) -> bool:
        asked.append(args)
        return False

    monkeypatch.setattr(gpu_costs, "grouping_pays", never)
    twin = packed(rotary_mlp())
    for rule in (TopK(2), Threshold(0.8)):
        with Calls() as calls:
            actual = forward_tokens(twin, tokens, uniform(rule), grouped=True).logits
        assert calls.waiting == []
        assert torch.equal(
            actual, forward_tokens(twin, tokens, uniform(rule), grouped=False).logits
        )
    assert {(n_pairs, n_tokens) for n_pairs, _, n_tokens, *_ in asked} == {(42, 42)}


@torch.no_grad()
def test_removed_experts(tokens: Tensor) -> None:
    decoder = rotary_mlp()
    some = Remaining(experts=((0, 3), (1, 2, 4)), attention=((0, 2), (1,)))
    smaller = packed(prune(decoder, some))
    for rule in (TopK(2), Threshold(2.5), Threshold(0.8)):
        expected = forward_tokens(smaller, tokens, uniform(rule), grouped=False).logits
        with Calls() as calls:
            actual = forward_tokens(smaller, tokens, uniform(rule), grouped=True).logits
        assert "_grouped_mm" in calls.operators
        assert_near(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [TopK(1), TopK(2), Threshold(2.5), Threshold(0.8)])
@torch.no_grad()
def test_on_a_gpu_nothing_waits(
    rule: Selection, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(gpu_costs, "grouping_pays", lambda *args: True)
    decoder = wide_enough()
    expected = decoder(tokens.repeat(1, 40), uniform(rule)).logits
    twin = packed(decoder).to("cuda", torch.bfloat16)
    tokens_BT = tokens.repeat(1, 40).cuda()
    first = forward_tokens(twin, tokens_BT, uniform(rule), grouped=True).logits
    torch.cuda.set_sync_debug_mode("error" if rule != Threshold(0.8) else "default")
    try:
        again = forward_tokens(twin, tokens_BT, uniform(rule), grouped=True).logits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)  # whatever the order in which a GPU works
    # Where a token's experts nearly tie, rounding can choose others.
    assert (first.cpu().float() - expected).abs().median() < 1e-2 * expected.abs().max()


def wide_enough() -> Decoder:
    return uneven(
        Decoder(
            V,
            64,
            2,
            attention=ATTENTION,
            feed_forward=partial(FEED_FORWARD, d_expert=32, experts=partial(MLPExperts, bias=True)),
        )
    )

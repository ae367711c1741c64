"""Slots against a loop over tokens, and what would wait for a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode_cuda.expert_slots import all_slots, choose_slots
from lightning_dsmoe.inference.engine.decode_cuda.products import SUMS
from lightning_dsmoe.inference.engine.decode_cuda.static_step import StaticStep
from lightning_dsmoe.routing import AllExperts, Routing, Selection, Threshold, TopK
from lightning_dsmoe.routing.removed import select

from ..conftest import DECODERS, SELECTIONS, MakeDecoder, packed, uniform

TIES = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2], [0.3, 0.3, 0.1, 0.15, 0.15]])


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("remaining", [None, (0, 3, 4), (2,)], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 2, 16])
@pytest.mark.parametrize("ties", [False, True])
def test_slots(
    selection: Selection, remaining: tuple[int, ...] | None, n_tokens: int, ties: bool
) -> None:
    probs_BE = TIES[torch.arange(n_tokens) % 2] if ties else torch.randn(n_tokens, 5).softmax(-1)
    routing = Routing(probs_BE.log(), probs_BE)
    left = None if remaining is None else torch.tensor(remaining)
    gates, active = select(selection, routing, left)
    slots = choose_slots(selection, routing, left)
    running = [e for e in range(active.shape[1]) if any(active[:, e].tolist())]
    assert slots.n_active_1.tolist() == [len(running)]
    n_slots = len(slots.experts_K)
    assert n_slots == active.shape[1] or n_slots == n_tokens * selection.k
    padding = [running[-1]] * (n_slots - len(running))
    assert slots.experts_K.tolist() == running + padding
    assert torch.equal(slots.gates_KB[: len(running)], gates.T[running])
    assert not slots.gates_KB[len(running) :].any()


def test_every_expert_has_a_slot() -> None:
    slots = all_slots(torch.rand(3, 2))
    assert (slots.experts_K.tolist(), slots.n_active_1.tolist()) == ([0, 1, 2], [3])


class NothingWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, or copies from its memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith(("index", "_index_put")) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique_dim"}
        assert name not in waits, f"{func} waits"
        assert not masks, f"{func} counts the true values of a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", [Tensor.item, Tensor.nonzero, bool])
def test_what_waits_is_seen(read: Any) -> None:
    with pytest.raises(AssertionError, match="waits"), NothingWaits():
        read(torch.zeros(1))


def test_a_mask_as_an_index_is_seen() -> None:
    with pytest.raises(AssertionError, match="counts"), NothingWaits():
        torch.zeros(2)[torch.zeros(2) > 1]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("make", DECODERS)
@pytest.mark.parametrize("n_sequences", [1, 3])
@torch.no_grad()
def test_nothing_in_a_step_waits(selection: Selection, make: MakeDecoder, n_sequences: int) -> None:
    twin = packed(make(), int8=True)
    step = StaticStep(twin, uniform(selection), SUMS, compiled=False)
    cache = DecoderCache(twin, n_sequences, 70)
    tokens_B = torch.zeros(n_sequences, dtype=torch.long)
    with NothingWaits():
        slots = cache.next_slots()
        step(tokens_B, *slots)


@pytest.mark.parametrize("selection", [TopK(2), Threshold(0.8), AllExperts()], ids=str)
@torch.no_grad()
def test_blocks_alike_share_what_is_compiled(
    selection: Selection, one_decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []
    real = torch.compile

    def counted(piece: Any, *, options: Any, **of_compile: Any) -> Any:
        assert of_compile == {"fullgraph": True, "dynamic": False}
        return real(piece, backend=lambda graph, _: graphs.append(graph) or graph, **of_compile)

    monkeypatch.setattr(torch, "compile", counted)
    torch.compiler.reset()
    twin, plan = packed(one_decoder), uniform(selection)
    compiled, plain = (StaticStep(twin, plan, SUMS, compiled=each) for each in (True, False))
    caches = [DecoderCache(twin, 2, 200) for _ in range(2)]
    for at in range(66):  # the part in use grows
        tokens_B = torch.tensor([at % 7, 5])
        found = compiled(tokens_B, *caches[0].next_slots())
        assert torch.equal(found, plain(tokens_B, *caches[1].next_slots()))
    assert len(graphs) == 4  # embed, before and after attention, and predict: of both blocks
    torch.compiler.reset()

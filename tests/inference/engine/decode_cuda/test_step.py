"""The step of a GPU, run on a CPU without compiling, against the plain decoder; and on a GPU."""

import copy
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import Remaining, prune
from lightning_dsmoe.inference.engine.batched.forward import forward_tokens
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode.compiled_step import CannotCompile
from lightning_dsmoe.inference.engine.decode_cuda import static_step
from lightning_dsmoe.inference.engine.decode_cuda import step as step_module
from lightning_dsmoe.inference.engine.decode_cuda.products import SUMS
from lightning_dsmoe.inference.engine.decode_cuda.seats import Run
from lightning_dsmoe.inference.engine.decode_cuda.step import CudaStep
from lightning_dsmoe.routing import AllExperts, Selection, SelectionPlan, Threshold, TopK, TopP

from ....pairwise import pairwise
from ..conftest import (
    DECODERS,
    SELECTIONS,
    MakeDecoder,
    V,
    assert_near,
    packed,
    rotary_mlp,
    token_by_token,
    uniform,
)


def in_steps(
    decoder: Decoder,
    plan: SelectionPlan,
    tokens: Tensor,
    prompt: int,
    mask: Tensor | None = None,
    *,
    step: CudaStep | None = None,
) -> Tensor:
    """Logits of each token after the prompt."""
    cache = DecoderCache(decoder, *tokens.shape)
    if prompt:
        first = None if mask is None else mask[:, :prompt]
        with torch.no_grad():
            forward_tokens(
                decoder, tokens[:, :prompt], plan, grouped=False, mask=first, caches=cache.layers
            )
    step = step or CudaStep(decoder, plan, len(tokens))
    return torch.stack([step(tokens_B, cache) for tokens_B in tokens[:, prompt:].T], 1)


@pytest.mark.parametrize(
    ("selection", "make", "n_sequences", "int8"),
    pairwise(selection=SELECTIONS, make=DECODERS, n_sequences=[1, 3, 16], int8=[False, True]),
)
def test_each_token_is_that_of_the_plain_decoder(
    selection: Selection, make: MakeDecoder, n_sequences: int, int8: bool
) -> None:
    twin, plan = packed(make(), int8=int8), uniform(selection)
    tokens = torch.randint(V, (n_sequences, 4))
    expected = token_by_token(twin, plan, tokens, 0)
    assert_near(in_steps(twin, plan, tokens, 0), expected, 4e-6)


@pytest.mark.parametrize(
    ("selection", "remaining", "n_sequences"),
    pairwise(
        selection=SELECTIONS, remaining=[((0, 3, 4), (1, 2)), ((2,), (0,))], n_sequences=[1, 3]
    ),
)
def test_experts_that_remain(
    selection: Selection,
    remaining: tuple[tuple[int, ...], tuple[int, ...]],
    n_sequences: int,
    one_decoder: Decoder,
    tokens: Tensor,
) -> None:
    experts, attention = remaining
    pruned = prune(one_decoder, Remaining((None, experts), (attention, None)))
    tokens, plan = tokens[:n_sequences], uniform(selection)
    expected = token_by_token(pruned, plan, tokens, 0)
    assert_near(in_steps(packed(pruned), plan, tokens, 0), expected, 4e-6)


@pytest.mark.parametrize(
    ("selection", "make", "n_sequences"),
    pairwise(selection=SELECTIONS, make=DECODERS, n_sequences=[2, 3]),
)
def test_padding_is_never_looked_at(
    selection: Selection, make: MakeDecoder, n_sequences: int, tokens: Tensor, mask: Tensor
) -> None:
    decoder = make()
    tokens, mask, plan = tokens[:n_sequences], mask[:n_sequences], uniform(selection)
    expected = token_by_token(decoder, plan, tokens, 9, mask)[:, 9:]
    assert_near(in_steps(packed(decoder), plan, tokens, 9, mask), expected, 4e-6)


def test_layers_of_different_selections(decoder: Decoder, tokens: Tensor) -> None:
    plan = SelectionPlan.of_blocks((TopK(1), Threshold(0.7)), (TopP(0.5), AllExperts()))
    plan = plan if decoder.plan_sizes[0][0] else SelectionPlan()
    for some in (tokens, tokens[:1]):
        expected = token_by_token(decoder, plan, some, 0)
        assert_near(in_steps(packed(decoder), plan, some, 0), expected, 4e-6)


@pytest.mark.parametrize("int8", [False, True])
def test_half_precision(int8: bool, decoder: Decoder, tokens: Tensor) -> None:
    twin = packed(decoder, int8=int8).bfloat16()
    expected = token_by_token(twin, uniform(AllExperts()), tokens, 0)
    assert_near(in_steps(twin, uniform(AllExperts()), tokens, 0), expected, 3e-2)


def test_the_cache_grows(one_decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[int] = []
    monkeypatch.setattr(
        CudaStep, "_captured", lambda self, run, cache: captures.append(cache.length) or run
    )
    twin, plan = packed(one_decoder), uniform(TopK(2))
    tokens = torch.randint(V, (2, 140))
    step = CudaStep(twin, plan, 2)
    found = in_steps(twin, plan, tokens, 0, step=step)
    assert captures == [1, 65, 129]
    assert_near(found, token_by_token(twin, plan, tokens, 0), 4e-6)
    assert torch.equal(in_steps(twin, plan, tokens[:, :70], 0, step=step), found[:, :70])
    assert captures == [1, 65, 129]  # the place of a cache that is gone is taken with its graphs


def test_a_place_is_clean(one_decoder: Decoder, tokens: Tensor) -> None:
    twin, plan = packed(one_decoder), uniform(TopK(2))
    step = CudaStep(twin, plan, 3)
    expected = in_steps(twin, plan, tokens[:, :5], 0, step=step)
    for seat in step._seats:
        for tensor in seat.memory.tensors:
            tensor.fill_(True if tensor.dtype == torch.bool else torch.nan)
    assert torch.equal(in_steps(twin, plan, tokens[:, :5], 0, step=step), expected)


def test_caches_by_turns(one_decoder: Decoder, tokens: Tensor) -> None:
    twin, plan = packed(one_decoder), uniform(TopK(2))
    step, several = CudaStep(twin, plan, 1), [tokens[:1], tokens[1:2], tokens[2:]]
    caches = [DecoderCache(twin, 1, 14) for _ in several]
    logits = [
        [step(some[:, at], cache) for some, cache in zip(several, caches, strict=True)]
        for at in range(14)
    ]
    found = torch.cat([torch.stack(each, 1) for each in zip(*logits, strict=True)])
    assert_near(found, token_by_token(twin, plan, tokens, 0), 4e-6)
    del caches
    gc.collect()
    assert [seat.cache for seat in step._seats] == [None] * 3


def test_a_longer_cache_takes_a_place_of_its_size(one_decoder: Decoder) -> None:
    twin = packed(one_decoder)
    step = CudaStep(twin, uniform(TopK(1)), 1)
    sizes = []
    for capacity in (10, 64, 65, 300, 100):
        cache = DecoderCache(twin, 1, capacity)
        step(torch.tensor([3]), cache)
        sizes.append([len(seat.memory.seen_SB) for seat in step._seats])
        assert (cache.capacity, cache.length) == (capacity, 1)
        del cache
    assert sizes == [[64], [64], [128], [512], [512]]


def test_prompts_go_on_in_a_cache_that_moved(one_decoder: Decoder, tokens: Tensor) -> None:
    twin, plan = packed(one_decoder), uniform(TopK(2))
    step, cache = CudaStep(twin, plan, 3), DecoderCache(twin, 3, 20)
    first = step(tokens[:, 0], cache)
    with torch.no_grad():
        middle = forward_tokens(twin, tokens[:, 1:9], plan, grouped=False, caches=cache.layers)
    last = step(tokens[:, 9], cache)
    found = torch.cat([first[:, None], middle.logits, last[:, None]], 1)
    assert_near(found, token_by_token(twin, plan, tokens, 0)[:, :10], 4e-6)


def test_a_cache_that_was_filled_up_anew_is_moved_again(one_decoder: Decoder) -> None:
    """Reading several tokens drops the rows that fill a step up, and so moves the cache."""
    twin, plan, tokens = packed(one_decoder), uniform(TopK(2)), torch.randint(V, (3, 6))
    step, cache = CudaStep(twin, plan, 4), DecoderCache(twin, 3, 20)

    def one(at: int) -> Tensor:
        cache.pad_to(4)
        return step(tokens[cache.sequence_of_row, at], cache)[:3, None]

    first = one(0)
    at_1 = cache._all.at_1
    cache.pad_to(3)
    assert cache._all.at_1 is not at_1  # which the next cache in that place writes to
    with torch.no_grad():
        middle = forward_tokens(twin, tokens[:, 1:4], plan, grouped=False, caches=cache.layers)
    found = torch.cat([first, middle.logits, one(4), one(5)], 1)
    assert_near(found, token_by_token(twin, plan, tokens, 0), 4e-6)
    assert len(step._seats) == 1


def test_a_full_cache(one_decoder: Decoder) -> None:
    twin = packed(one_decoder)
    step, cache = CudaStep(twin, uniform(TopK(1)), 1), DecoderCache(twin, 1, 2)
    for _ in range(2):
        step(torch.tensor([3]), cache)
    with pytest.raises(ValueError, match="3 tokens do not fit a cache of 2"):
        step(torch.tensor([3]), cache)


def test_layers_of_other_classes_are_refused(one_decoder: Decoder) -> None:
    class Own(type(one_decoder.blocks[0].feed_forward)): ...

    one_decoder.blocks[0].feed_forward.__class__ = Own
    with pytest.raises(CannotCompile, match="a Own has no decode step of its own"):
        CudaStep(packed(one_decoder), uniform(TopK(1)), 1)


class TestCards:
    """What is said of a GPU, by what it says of itself."""

    def weight(self, dtype: torch.dtype) -> Any:
        return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda"))

    @pytest.fixture(autouse=True)
    def card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
        monkeypatch.setattr(step_module, "find_spec", lambda _: True)

    def test_without_bfloat16(self) -> None:
        message = r"Tesla T4 does not compute in bfloat16 \(compute capability 7\.5, 8\.0 does\)"
        with pytest.raises(RuntimeError, match=message):
            step_module._check_card(self.weight(torch.bfloat16))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_other_types_need_no_more(self, dtype: torch.dtype) -> None:
        step_module._check_card(self.weight(dtype))

    def test_with_bfloat16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        step_module._check_card(self.weight(torch.bfloat16))

    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(step_module, "find_spec", lambda _: None)
        with pytest.raises(RuntimeError, match="Triton is missing: pip install triton"):
            step_module._check_card(self.weight(torch.float32))


class TestFailures:
    """What a GPU does here, a CPU pretends to."""

    @pytest.fixture(autouse=True)
    def memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(step_module.CudaStep, "_advice", lambda *_: "13.0 GB are needed")

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (RuntimeError("operation not permitted\nwhen stream is capturing"), "not permitted"),
            (torch.OutOfMemoryError("CUDA out of memory"), "13.0 GB are needed"),
        ],
        ids=["capture", "memory"],
    )
    def test_a_capture_that_fails(
        self,
        error: Exception,
        reason: str,
        one_decoder: Decoder,
        tokens: Tensor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def refuse(run: Run, pool: object) -> Run:
            raise error

        monkeypatch.setattr(step_module, "captured", refuse)
        twin, plan = packed(one_decoder), uniform(Threshold(0.8))
        step = CudaStep(twin, plan, 3)
        step._captures = True
        with pytest.warns(UserWarning, match=f"without a CUDA graph, more slowly: .*{reason}") as w:
            found = in_steps(twin, plan, tokens, 0, step=step)
        assert len(w) == 1
        assert_near(found, token_by_token(twin, plan, tokens, 0), 4e-6)

    def test_no_room_for_a_place(
        self, one_decoder: Decoder, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        twin, plan = packed(one_decoder), uniform(Threshold(0.8))
        step = CudaStep(twin, plan, 3)
        monkeypatch.setattr(step_module, "empty_slots", refuse)
        with pytest.warns(UserWarning, match=r"more slowly: 13\.0 GB are needed") as warned:
            found = in_steps(twin, plan, tokens, 0, step=step)
        assert len(warned) == 1
        assert_near(found, token_by_token(twin, plan, tokens, 0), 4e-6)

    def test_no_room_while_text_is_generated(self, one_decoder: Decoder, tokens: Tensor) -> None:
        twin, plan = packed(one_decoder), uniform(Threshold(0.8))
        step = CudaStep(twin, plan, 3)
        step._has_room = False
        with torch.inference_mode():
            found = in_steps(twin, plan, tokens, 2, step=step)
        assert_near(found, token_by_token(twin, plan, tokens, 2)[:, 2:], 4e-6)


@pytest.mark.gpu
class TestOnGPU:
    @pytest.fixture(autouse=True)
    def untuned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Trying block sizes takes most of the time of compiling, and changes no result."""
        monkeypatch.setattr(static_step, "_OPTIONS", {})

    @pytest.mark.parametrize(
        ("selection", "make", "n_sequences", "products", "int8"),
        pairwise(
            selection=SELECTIONS[2::3],
            make=DECODERS,
            n_sequences=[1, 3, 16],
            products=[None, SUMS],
            int8=[False, True],
        ),
    )
    def test_each_token_is_that_of_the_cpu(
        self,
        selection: Selection,
        make: MakeDecoder,
        n_sequences: int,
        products: object,
        int8: bool,
    ) -> None:
        twin, plan = packed(make(), int8=int8), uniform(selection)
        tokens = torch.randint(V, (n_sequences, 70))
        expected = token_by_token(twin, plan, tokens, 0)
        twin = copy.deepcopy(twin).cuda()
        step = CudaStep(twin, plan, n_sequences, products=products)
        found = in_steps(twin, plan, tokens.cuda(), 0, step=step)
        assert_near(found.cpu(), expected, 1e-5)

    @pytest.mark.parametrize(
        ("n_sequences", "dtype", "int8"),
        pairwise(
            n_sequences=[1, 4, 16],
            dtype=[torch.bfloat16, torch.float16, torch.float32],
            int8=[False, True],
        ),
    )
    def test_one_graph_a_size_and_no_waiting(
        self, n_sequences: int, dtype: torch.dtype, int8: bool, one_decoder: Decoder
    ) -> None:
        twin, plan = packed(one_decoder, int8=int8).to("cuda", dtype), uniform(Threshold(0.8))
        tokens = torch.randint(V, (n_sequences, 140)).cuda()
        step = CudaStep(twin, plan, n_sequences)
        first = in_steps(twin, plan, tokens, 0, step=step)
        (seat,) = step._seats
        runs = dict(seat.runs)
        assert sorted(runs) == [64, 128, 256]
        assert step._captures
        cache = DecoderCache(twin, n_sequences, 140)
        step(tokens[:, 0], cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = [step(tokens_B, cache) for tokens_B in tokens[:, 1:].T]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert seat.runs == runs
        assert torch.equal(torch.stack(again, 1), first[:, 1:])  # the same bits, too
        with torch.no_grad():
            caches = twin.new_caches(n_sequences, 140)
            expected = [twin(t[:, None], plan, caches=caches).logits for t in tokens.T]
        assert_near(first, torch.cat(expected, 1), 2e-5 if dtype == torch.float32 else 4e-2)


def test_rotary_mlp_has_unaligned_sizes() -> None:
    experts = packed(rotary_mlp()).blocks[0].feed_forward.experts
    assert experts.w_in.weight.shape[1] % 16

"""The keys and values of all layers: places of new tokens, growth and limits."""

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.batched.forward import forward_tokens
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.routing import AllExperts

from .conftest import packed, uniform


def test_one_token_after_another(one_decoder: Decoder) -> None:
    cache = DecoderCache(one_decoder, 3, 150)
    assert cache.capacity == 150
    assert cache.length == 0
    for at in range(150):
        slots = cache.next_slots()
        used = 64 if at < 64 else 128 if at < 128 else 150
        assert slots.at_1.tolist() == [at]
        assert slots.at_1.dtype == torch.int64
        assert cache.length == at + 1
        assert all(layer.length == at + 1 for layer in cache.layers)
        assert [keys.shape for keys in slots.keys] == [(used, 3, 2, 8)] * 2
        assert [values.shape for values in slots.values] == [(used, 3, 2, 8)] * 2
        assert torch.equal(slots.seen_SB, (torch.arange(used) <= at)[:, None].expand(-1, 3))
    with pytest.raises(ValueError, match="151 tokens do not fit a cache of 150"):
        cache.next_slots()
    assert cache.length == 150


def test_views_change_only_when_the_part_in_use_grows(one_decoder: Decoder) -> None:
    cache = DecoderCache(one_decoder, 1, 130)
    slots = [cache.next_slots() for _ in range(130)]
    assert len({id(some) for some in slots}) == 3
    for n, some in enumerate(slots):
        assert len(some.seen_SB) == min(130, (n // 64 + 1) * 64)


def test_what_is_written_to_a_slot_is_in_the_caches_of_the_layers(one_decoder: Decoder) -> None:
    cache = DecoderCache(one_decoder, 2, 70)
    for at in range(70):
        slots = cache.next_slots()
        for layer in range(2):
            slots.keys[layer][slots.at_1] = at + layer / 2
            slots.values[layer][slots.at_1] = -at - layer / 2
    for layer, kv in enumerate(cache.layers):
        expected = (torch.arange(70) + layer / 2)[:, None].expand(2, 2, -1, 8)
        assert torch.equal(kv.keys, expected)
        assert torch.equal(kv.values, -expected)
        assert kv.valid.all()


@pytest.mark.parametrize("prompt", [1, 9, 63, 64, 65, 128])
@torch.no_grad()
def test_slots_follow_a_prompt(prompt: int, one_decoder: Decoder) -> None:
    cache = DecoderCache(one_decoder, 2, 200)
    tokens = torch.randint(60, (2, prompt))
    mask = torch.ones(2, prompt, dtype=torch.bool)
    mask[1, : prompt // 2] = False
    plan = uniform(AllExperts())
    forward_tokens(packed(one_decoder), tokens, plan, grouped=False, mask=mask, caches=cache.layers)
    prompt_keys = [layer.keys[:, :, :prompt].clone() for layer in cache.layers]
    for new in range(2):
        slots = cache.next_slots()
        assert slots.at_1.tolist() == [prompt + new]
        used = min(200, ((prompt + new) // 64 + 1) * 64)
        expected = torch.zeros(used, 2, dtype=torch.bool)
        expected[:prompt] = mask.T
        expected[prompt : prompt + new + 1] = True
        assert torch.equal(slots.seen_SB, expected)
        for layer, keys in enumerate(slots.keys):
            assert torch.equal(keys[:prompt].permute(1, 2, 0, 3), prompt_keys[layer])
            assert keys[:prompt].abs().amin((2, 3)).min() > 0
            assert not keys[prompt:].any()


@torch.no_grad()
def test_a_prompt_that_does_not_fit(one_decoder: Decoder, tokens: Tensor) -> None:
    cache = DecoderCache(one_decoder, 3, 20)
    twin, plan = packed(one_decoder), uniform(AllExperts())
    forward_tokens(twin, tokens, plan, grouped=False, caches=cache.layers)
    with pytest.raises(ValueError, match="28 tokens do not fit a cache of 20"):
        forward_tokens(twin, tokens, plan, grouped=False, caches=cache.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_has_the_type_of_the_model(dtype: torch.dtype, one_decoder: Decoder) -> None:
    slots = DecoderCache(one_decoder.to(dtype), 1, 4).next_slots()
    assert {tensor.dtype for tensor in (*slots.keys, *slots.values)} == {dtype}
    assert slots.seen_SB.dtype == torch.bool


@pytest.mark.parametrize("sizes", [(6, 3, 8), (2, 2, 4)], ids=["heads", "width"])
def test_layers_with_other_heads_have_caches_of_their_size(
    sizes: tuple[int, int, int], one_decoder: Decoder
) -> None:
    one_decoder.blocks[1].attention = GroupedQueryAttention(48, *sizes)
    cache = DecoderCache(one_decoder, 3, 70)
    slots = cache.next_slots()
    _, *heads = sizes
    for all_layers in (slots.keys, slots.values):
        assert [each.shape[2:] for each in all_layers] == [(2, 8), tuple(heads)]
    assert [kv.keys.shape for kv in cache.layers] == [(3, 2, 70, 8), (3, heads[0], 70, heads[1])]
    assert (cache.capacity, cache.batch_size) == (70, 3)


@torch.no_grad()
def test_rows_left_over_hold_the_last_sequence(one_decoder: Decoder) -> None:
    cache = DecoderCache(one_decoder, 3, 70)
    tokens, mask = torch.randint(60, (3, 9)), torch.arange(9) >= torch.tensor([[0], [4], [2]])
    plan = uniform(AllExperts())
    forward_tokens(packed(one_decoder), tokens, plan, grouped=False, mask=mask, caches=cache.layers)
    before = [layer.keys.clone() for layer in cache.layers]
    for n_rows in (8, 4, 3):
        cache.pad_to(n_rows)
        assert (cache.n_rows, cache.batch_size, cache.length) == (n_rows, 3, 9)
        assert cache.sequence_of_row.tolist() == [0, 1, *[2] * (n_rows - 2)]
        for layer, keys in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.valid[:, :9], mask)
    cache.pad_to(4)
    slots = cache.next_slots()
    for keys, values in zip(slots.keys, slots.values, strict=True):
        assert torch.equal(keys[:, 2], keys[:, 3])
        assert torch.equal(values[:, 2], values[:, 3])
        assert keys.is_contiguous()
    assert torch.equal(slots.seen_SB[:, 2], slots.seen_SB[:, 3])

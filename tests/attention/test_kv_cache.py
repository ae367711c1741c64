import pytest
import torch

from lightning_dsmoe.attention import KVCache


def test_fills_from_the_left() -> None:
    cache = KVCache(2, 3, 5, 4)
    keys, values = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    valid = torch.tensor([[False, True, True, True], [True, True, True, True]])
    cache.append(keys[:, :, :3], values[:, :, :3], valid[:, :3])
    cache.append(keys[:, :, 3:], values[:, :, 3:], valid[:, 3:])
    assert cache.length == 4
    assert cache.capacity == 5
    assert torch.equal(cache.keys[:, :, :4], keys)
    assert torch.equal(cache.values[:, :, :4], values)
    assert torch.equal(cache.valid[:, :4], valid)
    assert not cache.valid[:, 4:].any()


def test_more_tokens_than_fit_are_refused_and_leave_it_as_it_was() -> None:
    cache = KVCache(1, 1, 2, 4)
    new = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="3 tokens do not fit a cache of 2"):
        cache.append(new, new, torch.ones(1, 3, dtype=torch.bool))
    assert cache.length == 0


def test_takes_a_type() -> None:
    assert KVCache(1, 1, 2, 4, dtype=torch.bfloat16).keys.dtype == torch.bfloat16

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.attention import GroupedQueryAttention, KVCache
from lightning_dsmoe.attention.rotary import rotate, rotation
from lightning_dsmoe.routing import TopK


def one_head_after_another(layer: GroupedQueryAttention, x: Tensor) -> Tensor:
    """Attention of one sequence `[T, D]`, head by head, with a softmax written out."""
    heads, (length, _), width = layer.heads, x.shape, layer.d_head
    by = None
    if layer.rope_theta is not None:
        by = rotation(torch.arange(length), width, layer.rope_theta)
    keys, values = heads.kv(x).chunk(2, dim=-1)
    future = torch.ones(length, length).triu(1).bool()
    y = torch.zeros_like(x)
    for group in range(heads.n_groups):
        for head in range(heads.n_heads):
            at = slice(head * width, (head + 1) * width)
            q = x @ heads.w_q.weight[group, at].T
            if heads.b_q is not None:
                q = q + heads.b_q[group, at]
            q, k = heads.q_norm(q), heads.k_norm(keys[:, at])
            if by is not None:
                q, k = rotate(q, by), rotate(k, by)
            scores = (q @ k.T / width**0.5).masked_fill(future, float("-inf"))
            y = y + scores.softmax(-1) @ values[:, at] @ heads.w_o.weight[group, at]
    return y if heads.b_o is None else y + heads.b_o


def randomised(layer: GroupedQueryAttention) -> GroupedQueryAttention:
    layer.double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("rope_theta", [None, 100.0])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "qk norm and biases"])
def test_values_and_gradients_are_those_of_the_written_out_softmax(
    n_kv_heads: int, rope_theta: float | None, extras: bool
) -> None:
    layer = randomised(
        GroupedQueryAttention(
            8, 6, n_kv_heads, 4, rope_theta=rope_theta, qk_norm=extras, bias=extras
        )
    )
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    fast = layer(x).output
    slow = torch.stack([one_head_after_another(layer, sequence) for sequence in x])
    torch.testing.assert_close(fast, slow)
    wanted = [x, *layer.parameters()]
    upstream = torch.randn_like(slow)
    torch.testing.assert_close(
        torch.autograd.grad(fast, wanted, upstream), torch.autograd.grad(slow, wanted, upstream)
    )


def test_one_head_is_what_pytorch_computes() -> None:
    layer = GroupedQueryAttention(8, 1, 1, 4, rope_theta=None)
    x = torch.randn(1, 6, 8)
    keys, values = layer.heads.kv(x).chunk(2, dim=-1)
    queries = x @ layer.heads.w_q.weight[0].T
    heads = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    torch.testing.assert_close(layer(x).output, heads @ layer.heads.w_o.weight[0])


def test_has_nothing_to_select() -> None:
    layer, x = GroupedQueryAttention(8, 4, 2, 4), torch.randn(2, 3, 8)
    assert layer(x, TopK(1)).routing is None
    assert torch.equal(layer(x, TopK(1)).output, layer(x).output)


def test_cache_holds_the_key_value_heads_only() -> None:
    layer = GroupedQueryAttention(8, 6, 2, 4)
    cache = KVCache(3, layer.n_kv_heads, 5, layer.d_head)
    layer(torch.randn(3, 5, 8), cache=cache)
    assert cache.keys.shape == (3, 2, 5, 4)
    assert cache.length == 5


def test_normalised_heads_train_under_autocast() -> None:
    layer = GroupedQueryAttention(8, 4, 2, 4, qk_norm=True, bias=True)
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x).output
    output.float().square().sum().backward()
    torch.testing.assert_close(output.float(), layer(x).output, atol=5e-2, rtol=5e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 6, 4, 4), "n_kv_heads must divide n_heads, got n_heads=6, n_kv_heads=4"),
        ((8, 6, 0, 4), "n_kv_heads=0"),
        ((8, 0, 1, 4), "got d_model=8, 0 groups of 1 heads"),
        ((0, 2, 1, 4), "got d_model=0"),
        ((8, 2, 1, 3), "even d_head and rope_theta > 0, got d_head=3"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(*sizes)


def test_frequencies_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="got d_head=4, rope_theta=-1"):
        GroupedQueryAttention(8, 2, 1, 4, rope_theta=-1)
    GroupedQueryAttention(8, 2, 1, 3, rope_theta=None)

"""Attention of encoders and padding on either side, judged by PyTorch's own attention.

Shapes: B sequences, T positions, D width, R rows of a weight, C head width.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe import (
    AllExperts,
    Decoder,
    GroupedQueryAttention,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    Threshold,
    TopK,
)
from lightning_dsmoe.attention import Attention, KVCache
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.routing import Selection
from lightning_dsmoe.serialization.architecture import build_decoder, describe_decoder, differences

B, T, D, C = 3, 6, 8, 4
SELECTIONS = [AllExperts(), TopK(1), TopK(2), Threshold(0.9), TopK(2, renormalize=True)]
OPTIONS = {"rope_theta": None, "bias": True}
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()


def drawn(layer: Attention) -> Attention:
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer.double()


def mixture(*, causal: bool, rope: bool = False) -> MixtureOfAttentionHeads:
    theta = 10000.0 if rope else None
    layer = MixtureOfAttentionHeads(D, 3, 2, C, rope_theta=theta, bias=True, causal=causal)
    return drawn(layer)  # type: ignore[return-value]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def judge(heads: HeadGroups) -> nn.MultiheadAttention:
    """PyTorch's attention with the weights of a layer whose groups have gates of 1.

    It has heads as wide as the model's width over their number, so the widths here agree, and no
    shared keys, so those of a KV head are repeated for each group.
    """
    n_heads = heads.n_groups * heads.n_heads
    width = n_heads * C
    attention = nn.MultiheadAttention(width, n_heads, batch_first=True, dtype=torch.float64)
    k_2RD = heads.kv.weight.unflatten(0, (2, -1))
    k_bias_2R = heads.kv.bias.unflatten(0, (2, -1))
    repeated = heads.n_groups
    with torch.no_grad():
        weights = [heads.w_q().flatten(0, 1), *(part.repeat(repeated, 1) for part in k_2RD)]
        biases = [heads.b_q.flatten(), *(part.repeat(repeated) for part in k_bias_2R)]  # type: ignore[union-attr]
        attention.in_proj_weight.copy_(torch.cat(weights))
        attention.in_proj_bias.copy_(torch.cat(biases))
        attention.out_proj.weight.copy_(heads.w_o().flatten(0, 1).T)
        attention.out_proj.bias.copy_(heads.b_o)
    return attention


def judged(layer: nn.MultiheadAttention, x: Tensor, mask: Tensor, causal: bool) -> Tensor:
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if causal else None
    return layer(x, x, x, key_padding_mask=~mask, attn_mask=later, need_weights=False)[0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("make", ["plain", "mixture"])
def test_outputs_and_gradients_are_those_of_multihead_attention(
    make: str, side: str, causal: bool
) -> None:
    width, n_experts = 24, 3
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, T, width, dtype=torch.float64, generator=generator)
    mask = {"none": torch.ones(B, T).bool(), "right": PADDED, "left": PADDED.flip(1)}[side]
    layer: GroupedQueryAttention | MixtureOfAttentionHeads
    if make == "plain":
        layer = GroupedQueryAttention(width, 6, 2, C, **OPTIONS, causal=causal)  # type: ignore[arg-type]
    else:
        layer = MixtureOfAttentionHeads(width, n_experts, 2, C, **OPTIONS, causal=causal)  # type: ignore[arg-type]
    drawn(layer)
    if isinstance(layer, MixtureOfAttentionHeads):
        nn.init.zeros_(layer.router.weight)  # type: ignore[arg-type]
    torch_layer = judge(layer.heads)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(ours, mask=None if side == "none" else mask).output
    expected = judged(torch_layer, theirs, mask, causal)
    torch.testing.assert_close(y[mask], expected[mask])
    weight = torch.randn(y[mask].shape, dtype=torch.float64, generator=generator)
    (y[mask] * weight).sum().backward()
    (expected[mask] * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    out_grad = layer.heads.w_o.weight.grad
    assert out_grad is not None
    torch.testing.assert_close(out_grad.flatten(0, 1).T, torch_layer.out_proj.weight.grad)
    in_grad = torch_layer.in_proj_weight.grad
    assert in_grad is not None
    torch.testing.assert_close(layer.heads.w_q.weight.grad.flatten(0, 1), in_grad[:width])  # type: ignore[union-attr]


def by_token(layer: MixtureOfAttentionHeads, x: Tensor, selection: Selection) -> Tensor:
    """One sequence without padding: token by token, group by group, head by head."""
    routing = layer.router(x)
    gates = layer.gate_factor * selection(routing.probs).weight
    heads, length = layer.heads, len(x)
    k, v = heads.kv(x).unflatten(-1, (2, heads.n_heads, C)).unbind(1)
    rows = []
    for t in range(length):
        row = heads.b_o.clone()  # type: ignore[union-attr]
        seen = slice(0, t + 1) if layer.causal else slice(0, length)
        for e in range(heads.n_groups):
            q = (heads.w_q()[e] @ x[t] + heads.b_q[e]).view(heads.n_heads, C)  # type: ignore[index]
            attended = []
            for h in range(heads.n_heads):
                scores = (k[seen, h] @ q[h]) / C**0.5
                attended.append(scores.softmax(0) @ v[seen, h])
            row = row + gates[t, e] * (torch.cat(attended) @ heads.w_o()[e])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("sorts", [False, True], ids=["masked", "sorted"])
@torch.no_grad()
def test_selected_groups_are_those_of_a_loop(
    sorts: bool, selection: Selection, causal: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = mixture(causal=causal)
    monkeypatch.setattr(HeadGroups, "sparse_is_faster", lambda *_: sorts)
    y = layer(x, selection).output
    expected = torch.stack([by_token(layer, each, selection) for each in x])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("selection", [AllExperts(), TopK(1), Threshold(0.9)], ids=str)
@pytest.mark.parametrize("sorts", [False, True], ids=["masked", "sorted"])
@torch.no_grad()
def test_padded_is_alone(
    sorts: bool,
    selection: Selection,
    side: str,
    causal: bool,
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HeadGroups, "sparse_is_faster", lambda *_: sorts)
    layer = mixture(causal=causal, rope=True)
    mask = PADDED if side == "right" else PADDED.flip(1)
    output = layer(x, selection, mask=mask).output
    assert output.isfinite().all()
    for each, own, row in zip(x, mask, output, strict=True):
        alone = layer(each[own][None], selection).output[0]
        torch.testing.assert_close(row[own], alone)
    spoilt = torch.where(mask[..., None], x, 1e3)
    torch.testing.assert_close(layer(spoilt, selection, mask=mask).output[mask], output[mask])


@torch.no_grad()
def test_only_causal_attention_hides_later_tokens(x: Tensor) -> None:
    later = torch.cat([x[:, :-1], x[:, -1:] + 1], 1)
    for causal in (True, False):
        layer = mixture(causal=causal)
        same = torch.isclose(layer(x).output, layer(later).output).all(-1)[:, :-1]
        assert same.all() if causal else not same.any()


@pytest.mark.parametrize(
    "make",
    [
        partial(mixture, causal=False),
        lambda: GroupedQueryAttention(D, 4, 2, C, causal=False).double(),
    ],
)
def test_a_cache_is_refused_without_causality(make: Callable[[], Attention], x: Tensor) -> None:
    with pytest.raises(ValueError, match="attention with causal=False has no KV cache"):
        make()(x, cache=KVCache(B, 2, T, C, dtype=torch.float64))


def test_a_decoder_with_an_encoder_layer_is_refused() -> None:
    layers = {"feed_forward": partial(MixtureOfExperts, n_experts=2, d_expert=4)}
    heads = partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4)
    with pytest.raises(ValueError, match="a decoder needs causal attention, got causal=False"):
        Decoder(11, 8, 1, attention=partial(heads, causal=False), **layers)
    description = describe_decoder(Decoder(11, 8, 1, attention=heads, **layers))
    assert description["attention"]["init_args"]["causal"] is True
    del description["attention"]["init_args"]["causal"]  # as version 0.1 wrote it
    assert build_decoder(description).blocks[0].attention.causal is True  # type: ignore[union-attr]
    decoder = Decoder(11, 8, 1, attention=heads, **layers)
    assert differences(description, describe_decoder(decoder)) == []

"""Attention with the options of published models, against the modules of transformers.

Shapes: E groups of query heads, H KV heads, C head width, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import LlamaConfig, OlmoeConfig, PhiConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeRotaryEmbedding
from transformers.models.phi.modeling_phi import PhiAttention, PhiRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from lightning_dsmoe.attention import (
    GroupedQueryAttention,
    KVCache,
    LinearRopeScaling,
    Llama3RopeScaling,
    MixtureOfAttentionHeads,
    YarnRopeScaling,
)
from lightning_dsmoe.routing import TopK

D, E, H, C = 24, 3, 2, 10
SIZES = {
    "hidden_size": D,
    "num_attention_heads": E * H,
    "num_key_value_heads": H,
    "head_dim": C,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class Stock(NamedTuple):
    """An attention of transformers, and the options with which ours is the same."""

    attention: Callable[..., nn.Module]
    rotary: Callable[..., nn.Module]
    config: Any
    options: dict[str, Any]


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


STOCK = {
    "llama": Stock(LlamaAttention, LlamaRotaryEmbedding, LlamaConfig(**SIZES), {}),
    "llama, biases": Stock(
        LlamaAttention,
        LlamaRotaryEmbedding,
        LlamaConfig(**SIZES, attention_bias=True),
        {"bias": True},
    ),
    "llama, linear": Stock(
        LlamaAttention,
        LlamaRotaryEmbedding,
        LlamaConfig(**SIZES, **rope("linear", factor=4.0)),
        {"rope_scaling": LinearRopeScaling(4.0)},
    ),
    "llama, llama3": Stock(
        LlamaAttention,
        LlamaRotaryEmbedding,
        LlamaConfig(**SIZES, **rope("llama3", **LLAMA3, original_max_position_embeddings=16)),
        {"rope_scaling": Llama3RopeScaling(**LLAMA3, original_max_positions=16)},
    ),
    "llama, yarn": Stock(
        LlamaAttention,
        LlamaRotaryEmbedding,
        LlamaConfig(**SIZES, **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
        {"rope_scaling": YarnRopeScaling(4.0, original_max_positions=16)},
    ),
    "qwen2": Stock(
        Qwen2Attention,
        Qwen2RotaryEmbedding,
        Qwen2Config(**SIZES),
        {"bias": True, "output_bias": False},
    ),
    "qwen3": Stock(
        Qwen3Attention,
        Qwen3RotaryEmbedding,
        Qwen3Config(**SIZES, rms_norm_eps=0.1),
        {"qk_norm": True, "norm_eps": 0.1},
    ),
    "olmoe": Stock(
        OlmoeAttention,
        OlmoeRotaryEmbedding,
        OlmoeConfig(**{**SIZES, "head_dim": D // (E * H)}, rms_norm_eps=0.1),
        {"qk_norm": "projection", "norm_eps": 0.1},
    ),
    "phi": Stock(
        PhiAttention,
        PhiRotaryEmbedding,
        PhiConfig(
            **{**SIZES, "head_dim": D // (E * H)}, **rope("default", partial_rotary_factor=0.5)
        ),
        {"bias": True, "rotary_fraction": 0.5},
    ),
}


def drawn(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.4)
    return module


def theirs_of(stock: Stock) -> Callable[[Tensor], Tensor]:
    layer = drawn(stock.attention(stock.config, 0))

    def run(x: Tensor) -> Tensor:
        length = x.shape[1]
        angles = stock.rotary(stock.config)(x, torch.arange(length)[None])
        hidden = torch.full((length, length), -torch.inf).triu(1)[None, None]
        output: Tensor = layer(x, angles, attention_mask=hidden)[0]
        return output

    run.layer = layer  # type: ignore[attr-defined]
    return run


def of_groups(rows: Tensor) -> Tensor:
    """Rows of query heads in our order: group by group, where theirs is KV head by KV head."""
    return rearrange(rows, "(h e c) ... -> e (h c) ...", h=H, e=E)


def copied(theirs: nn.Module, ours: nn.Module) -> None:
    """Give ours the weights of theirs."""
    heads, output = ours.heads, getattr(theirs, "o_proj", None) or theirs.dense
    queries, keys, values = theirs.q_proj, theirs.k_proj, theirs.v_proj
    with torch.no_grad():
        heads.w_q.weight.copy_(of_groups(queries.weight))
        heads.w_o.weight.copy_(of_groups(output.weight.T))
        heads.kv.weight.copy_(torch.cat([keys.weight, values.weight]))
        if queries.bias is not None:
            heads.b_q.copy_(of_groups(queries.bias))
            heads.kv.bias.copy_(torch.cat([keys.bias, values.bias]))
        assert (output.bias is None) == (heads.b_o is None)
        if output.bias is not None:
            heads.b_o.copy_(output.bias)
        for name in ("q_norm", "k_norm"):
            if isinstance(getattr(theirs, name, None), nn.Module):
                weight, own = getattr(theirs, name).weight, getattr(heads, name).weight
                groups = E if name == "q_norm" and own.ndim > 1 else 1
                by_group = rearrange(weight, "(h e c) -> e h c", e=groups, c=own.shape[-1])
                own.copy_(by_group.view_as(own))


def make(name: str) -> tuple[Callable[[Tensor], Tensor], GroupedQueryAttention]:
    stock = STOCK[name]
    theirs = theirs_of(stock)
    d_head = theirs.layer.head_dim  # type: ignore[attr-defined]
    ours = GroupedQueryAttention(D, E * H, H, d_head, **stock.options)
    copied(theirs.layer, ours)  # type: ignore[attr-defined]
    return theirs, ours


def near(found: Tensor, expected: Tensor) -> None:
    bound = 3e-6 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", STOCK)
def test_outputs_and_gradients_are_those_of_transformers(name: str) -> None:
    theirs, ours = make(name)
    x, cotangent = torch.randn(2, 60, D, requires_grad=True), torch.randn(2, 60, D)
    expected, found = theirs(x), ours(x).output
    near(found, expected)
    layer = theirs.layer  # type: ignore[attr-defined]
    x_grad, q_grad, k_grad = torch.autograd.grad(
        expected, (x, layer.q_proj.weight, layer.k_proj.weight), cotangent
    )
    own = torch.autograd.grad(found, (x, ours.heads.w_q.weight, ours.heads.kv.weight), cotangent)
    for gradient, other in zip(own, (x_grad, of_groups(q_grad), k_grad), strict=True):
        near(gradient[: len(other)], other)


@pytest.mark.parametrize("name", [name for name in STOCK if name not in ("llama", "olmoe")])
def test_each_option_matters(name: str) -> None:
    theirs, ours = make(name)
    changed = {
        **STOCK[name].options,
        "rope_scaling": None,
        "rotary_fraction": 1.0,
        "norm_eps": None,
    }
    if changed.get("bias"):
        nn.init.zeros_(ours.heads.b_q)  # type: ignore[arg-type]
    plain = GroupedQueryAttention(D, E * H, H, ours.d_head, **changed)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 60, D)
    expected = theirs(x)
    assert (plain(x).output - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_padded_sequences_in_pieces_are_those_in_one(name: str) -> None:
    theirs, ours = make(name)
    x = torch.randn(2, 20, D)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :7] = False
    cache = KVCache(2, H, 20, ours.d_head)
    parts = zip(x.split([9, 1, 1, 9], 1), mask.split([9, 1, 1, 9], 1), strict=True)
    found = torch.cat([ours(piece, mask=m, cache=cache).output for piece, m in parts], 1)
    near(found[0], theirs(x[:1])[0])
    near(found[1, 7:], theirs(x[1:, 7:])[0])


ROUTED = [name for name in STOCK if name != "olmoe"]


@pytest.mark.parametrize("name", ROUTED)
def test_attention_experts_under_equal_gates_are_the_same(name: str) -> None:
    theirs, ours = make(name)
    mixture = MixtureOfAttentionHeads(D, E, H, ours.d_head, **STOCK[name].options)
    mixture.heads.load_state_dict(ours.heads.state_dict())
    nn.init.zeros_(mixture.router.weight)  # type: ignore[arg-type]
    x = torch.randn(2, 40, D)
    near(mixture(x).output, theirs(x))
    mixture.heads.sparse_is_faster = lambda x: True  # type: ignore[method-assign]
    near(mixture(x, TopK(E)).output, theirs(x))


def test_attention_experts_have_no_norm_over_all_heads() -> None:
    with pytest.raises(ValueError, match="got 'projection': a norm over all heads would depend"):
        MixtureOfAttentionHeads(D, E, H, C, qk_norm="projection")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="true, false or 'projection', got 'heads'"):
        GroupedQueryAttention(D, E * H, H, C, qk_norm="heads")  # type: ignore[arg-type]

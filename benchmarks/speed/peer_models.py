"""Models of this library and of Hugging Face transformers of the same shapes, random weights.

Shapes: B sequences, T tokens.
"""

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import (
    DynamicCache,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StaticCache,
)

from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
from lightning_dsmoe.experts import GLUExperts

_NAMES = ("cache", "past_key_values")
_CACHE = next(n for n in _NAMES if n in inspect.signature(LlamaForCausalLM.forward).parameters)
"""The argument's name, which depends on the version of transformers."""


class Size(NamedTuple):
    """Sizes of all models.

    `d_expert` is that of experts with GELU, `d_glu` of those with SwiGLU, `d_jet` of those with
    SwiGLU beside as many attention experts of one head.
    """

    vocabulary: int
    d_model: int
    n_layers: int
    d_head: int
    d_expert: int
    d_glu: int
    d_jet: int
    n_experts: int = 32
    n_attention_experts: int = 8
    n_kv_heads: int = 2


FULL = Size(4096, 768, 12, d_head=64, d_expert=128, d_glu=96, d_jet=64)
TINY = Size(256, 64, 2, d_head=8, d_expert=16, d_glu=12, d_jet=8)


def ds_moe(size: Size) -> Decoder:
    """Experts with GELU, and attention experts of two heads."""
    return _decoder(size, d_expert=size.d_expert)


def glu_ds_moe(size: Size) -> Decoder:
    """The twin of `qwen3_moe`."""
    experts = partial(GLUExperts, activation="silu")
    return _decoder(size, d_expert=size.d_glu, experts=experts, qk_norm=True)


def jet_ds_moe(size: Size) -> Decoder:
    """The twin of `jet_moe`: as many attention experts as others, each of one head."""
    size = size._replace(n_attention_experts=size.n_experts, n_kv_heads=1)
    return _decoder(size, d_expert=size.d_jet, experts=partial(GLUExperts, activation="silu"))


def _decoder(size: Size, *, d_expert: int, qk_norm: bool = False, **options: Any) -> Decoder:
    attention = partial(
        MixtureOfAttentionHeads,
        n_experts=size.n_attention_experts,
        n_heads=size.n_kv_heads,
        d_head=size.d_head,
        qk_norm=qk_norm,
    )
    feed_forward = partial(MixtureOfExperts, n_experts=size.n_experts, d_expert=d_expert, **options)
    torch.manual_seed(0)
    decoder = Decoder(
        size.vocabulary, size.d_model, size.n_layers, attention=attention, feed_forward=feed_forward
    )
    return decoder.eval().requires_grad_(False)


def llama(size: Size) -> PreTrainedModel:
    """Dense, its feed-forward layers as wide as makes it as large as `ds_moe`."""
    routers = size.n_experts + size.n_attention_experts
    d_hidden = (2 * size.n_experts * size.d_expert + routers) / 3
    return _frozen(
        LlamaForCausalLM,
        LlamaConfig,
        size,
        intermediate_size=8 * round(d_hidden / 8),
        **_attention_of(size),
    )


def qwen3_moe(size: Size, experts_implementation: str, *, n_active: int) -> PreTrainedModel:
    """Experts with SwiGLU, plain grouped-query attention."""
    model = _frozen(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        size,
        num_experts=size.n_experts,
        num_experts_per_tok=n_active,
        moe_intermediate_size=size.d_glu,
        **_attention_of(size),
    )
    model.set_experts_implementation(experts_implementation)
    return model


def jet_moe(size: Size, *, n_active: int) -> PreTrainedModel:
    """Experts with SwiGLU, and as many attention experts of one head."""
    return _frozen(
        JetMoeForCausalLM,
        JetMoeConfig,
        size,
        num_local_experts=size.n_experts,
        num_experts_per_tok=n_active,
        intermediate_size=size.d_jet,
        kv_channels=size.d_head,
        num_key_value_heads=1,
    )


def _attention_of(size: Size) -> dict[str, int]:
    return {
        "num_attention_heads": size.n_attention_experts * size.n_kv_heads,
        "num_key_value_heads": size.n_kv_heads,
        "head_dim": size.d_head,
    }


def _frozen(
    model: type[PreTrainedModel], config: Callable[..., Any], size: Size, **sizes: int
) -> PreTrainedModel:
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=size.vocabulary,
            hidden_size=size.d_model,
            num_hidden_layers=size.n_layers,
            tie_word_embeddings=True,
            **sizes,
        )
    )
    return made.eval().requires_grad_(False)


def parameters(model: nn.Module) -> int:
    """Parameters, those that are shared counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


class Peer:
    """Reads with a model of transformers, with its default cache.

    Args:
        model: the model.
        most_tokens: tokens of prompts that are read at once; None for all.
    """

    def __init__(self, model: PreTrainedModel, *, most_tokens: int | None = None) -> None:
        self._model = model
        self._most_tokens = most_tokens

    def start(self, prompt_BT: Tensor) -> None:
        """Forget everything and read prompts."""
        self._cache = DynamicCache(config=self._model.config)
        most = self._most_tokens or prompt_BT.numel()
        for piece in prompt_BT.split(max(1, most // len(prompt_BT)), dim=1):
            _next_tokens(self._model, piece, self._cache)

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Read one token more of each sequence and give the most probable one after it, `[B]`."""
        return _next_tokens(self._model, tokens_B1, self._cache)


class CompiledPeer:
    """Reads prompts as `Peer` does and single tokens compiled, with a static cache.

    Args:
        model: the model.
        capacity: most tokens of a sequence.
        mode: of `torch.compile`, such as "reduce-overhead" on a GPU.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, *, mode: str | None = None) -> None:
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._compiled = torch.compile(_next_tokens, mode=mode)

    def start(self, prompt_BT: Tensor) -> None:
        """Forget everything and read prompts."""
        self._cache.reset()
        _next_tokens(self._model, prompt_BT, self._cache)

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Read one token more of each sequence and give the most probable one after it, `[B]`."""
        return self._compiled(self._model, tokens_B1, self._cache)


def _next_tokens(
    model: PreTrainedModel, tokens_BT: Tensor, cache: DynamicCache | StaticCache
) -> Tensor:
    output = model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1, **{_CACHE: cache})
    return output.logits[:, -1].argmax(-1)

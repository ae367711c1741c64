"""The `config.json` of a stock class of transformers."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.hugging_face.targets import StockClass
from lightning_dsmoe.hugging_face.traits import traits
from lightning_dsmoe.routing import SelectionPlan

_LOOP = "experts_implementation"
"""Read by transformers; its default raises an error where rows are not multiples of these bytes."""
_GROUPED_BYTES = 16
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def stock_config(
    stock: StockClass,
    decoder: Decoder,
    plan: SelectionPlan,
    *,
    dtype: torch.dtype,
    context_length: int,
    token_ids: Mapping[str, int | None],
) -> dict[str, Any]:
    """The configuration, in the form of transformers 5.

    Every special token is written, since the defaults of some classes are beyond a small
    vocabulary.

    Args:
        stock: a class that computes what the decoder does.
        decoder: the decoder.
        plan: the experts that run.
        dtype: type of the weights in the files.
        context_length: most tokens that the model attends to.
        token_ids: the special tokens, None or left out where there is none.
    """
    found = traits(decoder, plan)
    the = found.the
    common = {
        "architectures": [stock.architecture],
        "model_type": stock.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.d_model,
        "num_hidden_layers": decoder.n_layers,
        "num_key_value_heads": the("KV heads"),
        "num_experts_per_tok": the("experts that run"),
        "intermediate_size": the("d_expert"),
        "rms_norm_eps": the("eps"),
        "rope_parameters": dict(the("rotary positions")),
        "max_position_embeddings": context_length,
        "tie_word_embeddings": decoder.tie_embeddings,
        **{name: token_ids.get(name) for name in TOKEN_IDS},
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "output_router_logits": False,
        "use_cache": True,
    }
    if stock.mixes_heads:
        return common | {
            "kv_channels": the("d_head"),
            "num_local_experts": the("experts"),
            "activation_function": the("activation"),
        }
    heads = {
        "num_attention_heads": the("heads"),
        "head_dim": the("d_head"),
        "hidden_act": the("activation"),
    }
    widths = {} if _is_aligned(decoder.d_model, the("d_expert"), dtype) else {_LOOP: "eager"}
    config = common | heads | _OF_CLASS[stock.model_type](the) | widths
    if found.dense:
        config |= {"mlp_only_layers": list(found.dense), "intermediate_size": the("d_hidden")}
    return config


def _is_aligned(d_model: int, d_expert: int, dtype: torch.dtype) -> bool:
    """Whether rows of experts are as long as the grouped products of PyTorch need them."""
    return all(width * dtype.itemsize % _GROUPED_BYTES == 0 for width in (d_model, d_expert))


def _qwen3_moe(the: Any) -> dict[str, Any]:
    # Under both names: 5.24 writes the second one, other readers know the first.
    both = {"num_experts": the("experts"), "num_local_experts": the("experts")}
    return both | _of_qwen(the) | {"attention_bias": the("biases")[0]}


def _qwen2_moe(the: Any) -> dict[str, Any]:
    return _of_qwen(the) | {
        "num_experts": the("experts"),
        "qkv_bias": the("biases")[0],
        "shared_expert_intermediate_size": max(1, the("d_shared")),  # it always has one
    }


def _of_qwen(the: Any) -> dict[str, Any]:
    return {
        "moe_intermediate_size": the("d_expert"),
        "norm_topk_prob": the("gates of experts") == "renormalized",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _mixtral(the: Any) -> dict[str, Any]:
    return {
        "num_local_experts": the("experts"),
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }


def _olmoe(the: Any) -> dict[str, Any]:
    return {
        "num_experts": the("experts"),
        "norm_topk_prob": the("gates of experts") == "renormalized",
        "attention_bias": the("biases")[0],
        "clip_qkv": None,
    }


def _granitemoe(the: Any) -> dict[str, Any]:
    return {
        "num_local_experts": the("experts"),
        "attention_bias": the("biases")[0],
        "attention_multiplier": the("d_head") ** -0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def _granitemoeshared(the: Any) -> dict[str, Any]:
    return _granitemoe(the) | {"shared_intermediate_size": the("d_shared")}


_OF_CLASS = {
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "granitemoe": _granitemoe,
    "granitemoeshared": _granitemoeshared,
}

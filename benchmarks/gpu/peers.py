"""Models of transformers of the shapes that the paper compares with, random weights, bfloat16.

Shapes: B sequences, T tokens.
"""

import os
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers import PreTrainedModel

MISTRAL_7B: dict[str, Any] = {"sliding_window": None}  # else the configuration's own sizes
QWEN_MOE_A2_7B: dict[str, Any] = {}
DEEPSEEK_MOE_16B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "vocab_size": 102400,
}
"""Its attention is plain; transformers has these experts with the latent attention of version 2."""


def peer(kind: str, sizes: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """A model of transformers, made on a device.

    Args:
        kind: the name of its classes without their endings, such as Mistral.
        sizes: what its configuration has in place of its defaults.
        device: where.
    """
    transformers.logging.set_verbosity_error()
    config = getattr(transformers, f"{kind}Config")(**sizes)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with device:
            model: PreTrainedModel = getattr(transformers, f"{kind}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(default)
    return model.to(torch.bfloat16).eval().requires_grad_(False)
